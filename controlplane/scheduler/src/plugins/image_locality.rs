use crate::framework::{MAX_SCORE, NodeInfo, PodInfo, Score};

/// Prefers nodes that have the pod's images already, images on many nodes counting more so that one node does not draw all.
pub struct ImageLocality;

const MIN_PER_CONTAINER: i64 = 23 << 20;
const MAX_PER_CONTAINER: i64 = 1000 << 20;

/// Nodes report names with a tag; a bare name means latest.
fn with_tag(image: &str) -> String {
    let last = image.rsplit('/').next().unwrap_or(image);
    if last.contains(':') || image.contains('@') { image.to_owned() } else { format!("{image}:latest") }
}

impl Score for ImageLocality {
    fn name(&self) -> &'static str {
        "ImageLocality"
    }

    fn weight(&self) -> i64 {
        1
    }

    fn score(&self, pod: &PodInfo, nodes: &[&NodeInfo]) -> Vec<i64> {
        let containers: Vec<String> = pod
            .spec
            .init_containers
            .iter()
            .flatten()
            .chain(&pod.spec.containers)
            .map(|c| with_tag(c.image.as_deref().unwrap_or_default()))
            .collect();
        let spread: Vec<i64> = containers
            .iter()
            .map(|i| nodes.iter().filter(|n| n.images.contains_key(i)).count() as i64)
            .collect();
        let max = MAX_PER_CONTAINER * containers.len().max(1) as i64;
        let one = |n: &&NodeInfo| {
            let present = containers.iter().zip(&spread);
            let sum: i64 = present
                .filter_map(|(i, on)| n.images.get(i).map(|size| size * on / nodes.len().max(1) as i64))
                .sum();
            MAX_SCORE * (sum.clamp(MIN_PER_CONTAINER, max) - MIN_PER_CONTAINER) / (max - MIN_PER_CONTAINER)
        };
        nodes.iter().map(one).collect()
    }
}
