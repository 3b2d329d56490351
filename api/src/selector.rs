//! Label selectors (the structured form and the query-string form) and node selectors.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelector, NodeSelectorRequirement, NodeSelectorTerm};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

type Labels = BTreeMap<String, String>;

/// One condition on a label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    NotExists(String),
    /// The label is an integer greater than this.
    Gt(String, i64),
    Lt(String, i64),
}

/// Why a selector is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SelectorError {
    #[error("unable to parse selector {text:?}: {reason}")]
    Syntax { text: String, reason: String },
    #[error("{0:?} is not a valid selector operator")]
    Operator(String),
    #[error("operator {operator} of key {key:?} needs {needs}")]
    Values { key: String, operator: String, needs: &'static str },
}

/// A conjunction of requirements; the empty one matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector(pub Vec<Requirement>);

impl Requirement {
    fn new(key: &str, operator: &str, values: &[String]) -> Result<Requirement, SelectorError> {
        let key = key.to_owned();
        let needs = |needs| SelectorError::Values { key: key.clone(), operator: operator.to_owned(), needs };
        let number = || match values {
            [v] => v.parse().map_err(|_| needs("one integer")),
            _ => Err(needs("one integer")),
        };
        Ok(match operator {
            "In" | "NotIn" if values.is_empty() => return Err(needs("at least one value")),
            "In" => Requirement::In(key, values.to_vec()),
            "NotIn" => Requirement::NotIn(key, values.to_vec()),
            "Exists" | "DoesNotExist" if !values.is_empty() => return Err(needs("no values")),
            "Exists" => Requirement::Exists(key),
            "DoesNotExist" => Requirement::NotExists(key),
            "Gt" => Requirement::Gt(key.clone(), number()?),
            "Lt" => Requirement::Lt(key.clone(), number()?),
            _ => return Err(SelectorError::Operator(operator.to_owned())),
        })
    }

    pub fn matches(&self, labels: &Labels) -> bool {
        match self {
            Requirement::In(k, vs) => labels.get(k).is_some_and(|v| vs.contains(v)),
            Requirement::NotIn(k, vs) => labels.get(k).is_none_or(|v| !vs.contains(v)),
            Requirement::Exists(k) => labels.contains_key(k),
            Requirement::NotExists(k) => !labels.contains_key(k),
            Requirement::Gt(k, n) => {
                labels.get(k).and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v > *n)
            }
            Requirement::Lt(k, n) => {
                labels.get(k).and_then(|v| v.parse::<i64>().ok()).is_some_and(|v| v < *n)
            }
        }
    }
}

impl Selector {
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|r| r.matches(labels))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Equality with every label of a map (`spec.selector` of a Service or ReplicationController).
    pub fn from_map(map: &Labels) -> Selector {
        Selector(map.iter().map(|(k, v)| Requirement::In(k.clone(), vec![v.clone()])).collect())
    }

    /// `metav1.LabelSelector`. An empty selector matches all objects; what an absent one means is the caller's to say.
    pub fn from_label_selector(s: &LabelSelector) -> Result<Selector, SelectorError> {
        let mut all = Selector::from_map(s.match_labels.as_ref().unwrap_or(&Labels::new())).0;
        for e in s.match_expressions.iter().flatten() {
            all.push(Requirement::new(&e.key, &e.operator, e.values.as_deref().unwrap_or_default())?);
        }
        Ok(Selector(all))
    }

    /// The query-string form: `a=b,c!=d,e in (f,g),h notin (i),j,!k,n>1`.
    pub fn parse(text: &str) -> Result<Selector, SelectorError> {
        let mut p = Parser { text, rest: text };
        let mut all = Vec::new();
        p.space();
        while !p.rest.is_empty() {
            all.push(p.requirement()?);
            p.space();
            if !p.rest.is_empty() {
                p.token(",")?;
                p.space();
                if p.rest.is_empty() {
                    return Err(p.error("a requirement is missing after the last comma"));
                }
            }
        }
        Ok(Selector(all))
    }
}

struct Parser<'a> {
    text: &'a str,
    rest: &'a str,
}

impl Parser<'_> {
    fn error(&self, reason: impl Into<String>) -> SelectorError {
        SelectorError::Syntax { text: self.text.to_owned(), reason: reason.into() }
    }

    fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn accept(&mut self, t: &str) -> bool {
        self.space();
        match self.rest.strip_prefix(t) {
            Some(r) => {
                self.rest = r;
                true
            }
            None => false,
        }
    }

    fn token(&mut self, t: &str) -> Result<(), SelectorError> {
        if self.accept(t) { Ok(()) } else { Err(self.error(format!("expected {t:?} at {:?}", self.rest))) }
    }

    fn word(&mut self) -> String {
        self.space();
        let end = self
            .rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/')))
            .unwrap_or(self.rest.len());
        let (w, r) = self.rest.split_at(end);
        self.rest = r;
        w.to_owned()
    }

    fn values(&mut self) -> Result<Vec<String>, SelectorError> {
        self.token("(")?;
        let mut all = vec![self.word()];
        while self.accept(",") {
            all.push(self.word());
        }
        self.token(")")?;
        Ok(all)
    }

    fn requirement(&mut self) -> Result<Requirement, SelectorError> {
        let negated = self.accept("!");
        let key = self.word();
        if key.is_empty() {
            return Err(self.error(format!("expected a label key at {:?}", self.rest)));
        }
        if negated {
            return Ok(Requirement::NotExists(key));
        }
        if self.accept("!=") {
            return Ok(Requirement::NotIn(key, vec![self.word()]));
        }
        if self.accept("==") || self.accept("=") {
            return Ok(Requirement::In(key, vec![self.word()]));
        }
        for (sign, operator) in [(">", "Gt"), ("<", "Lt")] {
            if self.accept(sign) {
                let value = self.word();
                return Requirement::new(&key, operator, &[value]);
            }
        }
        let before = self.rest;
        match self.word().as_str() {
            "in" => Ok(Requirement::In(key, self.values()?)),
            "notin" => Ok(Requirement::NotIn(key, self.values()?)),
            "" => Ok(Requirement::Exists(key)),
            other => {
                let e = format!("expected an operator at {other:?}");
                self.rest = before;
                Err(self.error(e))
            }
        }
    }
}

fn node_requirements(rs: &[NodeSelectorRequirement]) -> Option<Selector> {
    let all: Result<_, _> = rs
        .iter()
        .map(|r| Requirement::new(&r.key, &r.operator, r.values.as_deref().unwrap_or_default()))
        .collect();
    all.ok().map(Selector)
}

/// Whether a node fits one term. A term without any requirement matches no node, and one that cannot be read matches none.
pub fn node_selector_term_matches(term: &NodeSelectorTerm, name: &str, labels: &Labels) -> bool {
    let exprs = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if exprs.is_empty() && fields.is_empty() {
        return false;
    }
    let field_values = Labels::from([("metadata.name".to_owned(), name.to_owned())]);
    node_requirements(exprs).is_some_and(|s| s.matches(labels))
        && node_requirements(fields).is_some_and(|s| s.matches(&field_values))
}

/// Terms are alternatives; a selector without terms matches no node.
pub fn node_selector_matches(s: &NodeSelector, name: &str, labels: &Labels) -> bool {
    s.node_selector_terms.iter().any(|t| node_selector_term_matches(t, name, labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(s: &str) -> Labels {
        s.split(',').filter_map(|kv| kv.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    }

    #[test]
    fn query_form() {
        for (sel, l, want) in [
            ("", "a=b", true),
            ("a=b", "a=b", true),
            ("a==b,c!=d", "a=b", true),
            ("a==b,c!=d", "a=b,c=d", false),
            ("a in (x, b)", "a=b", true),
            ("a notin (b)", "a=b", false),
            ("a notin (b)", "", true),
            ("a", "a=b", true),
            ("!a", "a=b", false),
            ("example.com/n>3", "example.com/n=4", true),
            ("n<3", "n=4", false),
            ("a=", "a=", true),
        ] {
            assert_eq!(Selector::parse(sel).unwrap().matches(&labels(l)), want, "{sel} on {l}");
        }
        for bad in ["a=b,", "a in b", "=x", "a b", "n>x", "a in (b"] {
            assert!(Selector::parse(bad).is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics(s in "\\PC*") {
            let _ = Selector::parse(&s);
        }
    }

    #[test]
    fn empty_node_terms_match_nothing() {
        assert!(!node_selector_term_matches(&NodeSelectorTerm::default(), "n", &Labels::new()));
    }
}
