//! Lengths at which a graph begins to compute in another way, such as that of `LongRoPE`, beyond which another table of rotary
//! angles is taken. The graph goes by the length that a batch is padded to, and a document must not see the difference.

use std::collections::BTreeSet;

use sluice_schemas::onnx::{GraphProto, NodeProto};

use super::constant::{behind, integers};

/// The lengths that decide which branch of an `If` is taken: the longest ones that are not beyond.
pub(super) fn length_limits(graph: &GraphProto) -> BTreeSet<i64> {
    let conditions =
        graph.node.iter().filter(|node| node.op_type() == "If").filter_map(|node| node.input.first());
    conditions
        .filter_map(|condition| graph.node.iter().find(|node| node.output.first() == Some(condition)))
        .filter_map(|comparison| limit(graph, comparison))
        .filter(|&limit| limit > 0)
        .collect()
}

/// The longest length for which `comparison` is what it is for short ones.
fn limit(graph: &GraphProto, comparison: &NodeProto) -> Option<i64> {
    let [one, other] = comparison.input.as_slice() else { return None };
    let constant = |name: &str| match integers(behind(graph, name)?.tensor)?.as_slice() {
        &[value] => Some(value),
        _ => None,
    };
    let is_beyond = |greater: &str, greater_or_equal: &str, bound: i64| match comparison.op_type() {
        op if op == greater => Some(bound),
        op if op == greater_or_equal => Some(bound - 1),
        _ => None,
    };
    // `length > bound` and `length <= bound` change behind the bound, `length >= bound` and `length < bound` before it.
    match (constant(one), constant(other)) {
        (None, Some(bound)) => {
            is_beyond("Greater", "GreaterOrEqual", bound).or_else(|| is_beyond("LessOrEqual", "Less", bound))
        }
        (Some(bound), None) => {
            is_beyond("Less", "LessOrEqual", bound).or_else(|| is_beyond("GreaterOrEqual", "Greater", bound))
        }
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use sluice_schemas::graph::GraphBuilder;

    use super::*;

    #[test]
    fn a_limit_is_the_longest_length_that_is_computed_as_short_ones_are() {
        let cases = [
            ("Greater", true, 32),
            ("GreaterOrEqual", true, 31),
            ("Less", true, 31),
            ("LessOrEqual", true, 32),
            ("Less", false, 32),
            ("LessOrEqual", false, 31),
            ("Greater", false, 31),
            ("GreaterOrEqual", false, 32),
        ];
        for (operator, is_second, wanted) in cases {
            let mut builder = GraphBuilder::new("");
            let bound = builder.int(32);
            let inputs = if is_second { ["length", &*bound] } else { [&*bound, "length"] };
            let condition = builder.node(operator, &inputs, vec![]);
            builder.node("If", &[&condition], vec![]);
            // A comparison that decides no branch is none.
            let other = builder.int(7);
            builder.node("Greater", &["length", &other], vec![]);
            let (node, initializer) = builder.finish();
            let graph = GraphProto { node, initializer, ..Default::default() };
            assert_eq!(length_limits(&graph), [wanted].into(), "{operator} {is_second}");
        }
    }
}
