//! What list requests have in common.

use std::collections::HashMap;

/// Whether `labels` has every pair of `selector`.
pub(crate) fn labels_fit(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_must_be_there() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let labels = map(&[("a", "1"), ("b", "2")]);
        assert!(labels_fit(&labels, &map(&[])));
        assert!(labels_fit(&labels, &map(&[("a", "1")])));
        assert!(!labels_fit(&labels, &map(&[("a", "2")])));
        assert!(!labels_fit(&labels, &map(&[("c", "")])));
    }
}
