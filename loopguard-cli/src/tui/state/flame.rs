//! Turns the stacks of blocks into one tree whose nodes weigh how long they held the loop.

use std::sync::{Arc, LazyLock};

use super::seen::Seen;
use crate::core::event::{Frame, FrameKind, Origin, Stack};

/// Of a longer row of frames that are not the user's, only the first and the last are told apart.
const MAX_OTHERS: usize = 3;

/// A tree of frames, outermost first. The root stands for all blocks and has no frame.
#[derive(Clone, Debug, Default)]
pub struct Flame {
    nodes: Vec<Node>,
}

#[derive(Clone, Debug, Default)]
pub struct Node {
    pub frame: Option<Arc<Frame>>,
    pub ns: u64,
    pub parent: usize,
    /// Heaviest first.
    pub children: Vec<usize>,
}

impl Flame {
    /// Each block weighs its duration, on the stack that stands for most of it.
    pub fn of<'a>(blocks: impl Iterator<Item = &'a Seen>) -> Self {
        let mut flame = Self { nodes: vec![Node::default()] };
        for block in blocks {
            flame.add(block);
        }
        for at in 0..flame.nodes.len() {
            let mut children = std::mem::take(&mut flame.nodes[at].children);
            children.sort_by_key(|&child| (std::cmp::Reverse(flame.nodes[child].ns), child));
            flame.nodes[at].children = children;
        }
        flame
    }

    fn add(&mut self, block: &Seen) {
        let ns = block.blocked_ns();
        let mut at = Self::ROOT;
        self.nodes[at].ns += ns;
        for frame in folded(&block.blame().stack) {
            at = self.child(at, &frame);
            self.nodes[at].ns += ns;
        }
    }

    fn child(&mut self, parent: usize, frame: &Arc<Frame>) -> usize {
        let is_it = |&&child: &&usize| self.nodes[child].frame.as_ref().is_some_and(|known| same(known, frame));
        if let Some(&child) = self.nodes[parent].children.iter().find(is_it) {
            return child;
        }
        let child = self.nodes.len();
        self.nodes.push(Node { frame: Some(Arc::clone(frame)), ns: 0, parent, children: Vec::new() });
        self.nodes[parent].children.push(child);
        child
    }

    pub const ROOT: usize = 0;

    pub fn node(&self, at: usize) -> Option<&Node> {
        self.nodes.get(at)
    }

    pub fn total_ns(&self) -> u64 {
        self.node(Self::ROOT).map_or(0, |root| root.ns)
    }

    /// The frames from the outermost one to this node, by which it is found again in another tree.
    pub fn path(&self, mut at: usize) -> Vec<Arc<Frame>> {
        let mut path = Vec::new();
        while let Some(node) = self.nodes.get(at)
            && let Some(frame) = &node.frame
        {
            path.push(Arc::clone(frame));
            at = node.parent;
        }
        path.reverse();
        path
    }

    /// The node at the end of a path, or the last one of it that is there.
    pub fn find(&self, path: &[Arc<Frame>]) -> usize {
        let mut at = Self::ROOT;
        for frame in path {
            let mut children = self.nodes.get(at).into_iter().flat_map(|node| &node.children);
            let is_it = |child: &&usize| self.nodes[**child].frame.as_ref().is_some_and(|known| same(known, frame));
            let Some(&child) = children.find(is_it) else { break };
            at = child;
        }
        at
    }
}

/// Whether a stack runs through a path of frames, outermost first.
pub fn runs_through(block: &Seen, path: &[Arc<Frame>]) -> bool {
    let frames = folded(&block.blame().stack);
    frames.len() >= path.len() && frames.iter().zip(path).all(|(frame, on_path)| same(frame, on_path))
}

/// Outermost first. Between the first and the last of many library frames stands [`FOLDED`].
fn folded(stack: &Stack) -> Vec<Arc<Frame>> {
    let mut frames = Vec::new();
    let runs = stack.frames.chunk_by(|a, b| (a.origin == Origin::User) == (b.origin == Origin::User));
    for run in runs.rev() {
        match run {
            [last, .., first] if run.len() > MAX_OTHERS && first.origin != Origin::User => {
                frames.extend([Arc::clone(first), Arc::clone(&FOLDED), Arc::clone(last)]);
            }
            _ => frames.extend(run.iter().rev().cloned()),
        }
    }
    frames
}

/// Stands for library frames that are not told apart.
pub static FOLDED: LazyLock<Arc<Frame>> = LazyLock::new(|| {
    Arc::new(Frame {
        kind: FrameKind::Python,
        origin: Origin::Library,
        function: "...".into(),
        file: None,
        line: None,
        module: None,
    })
});

/// Of the user's code every line counts, of any other only the function.
fn same(a: &Arc<Frame>, b: &Arc<Frame>) -> bool {
    Arc::ptr_eq(a, b)
        || (a.function == b.function
            && a.file == b.file
            && a.module == b.module
            && (a.line == b.line || a.origin != Origin::User))
}

#[cfg(test)]
mod tests {
    use super::super::scripted::{block, stack};
    use super::*;

    fn shown(flame: &Flame) -> String {
        fn add(flame: &Flame, at: usize, depth: usize, text: &mut String) {
            let node = flame.node(at).unwrap();
            let name = node.frame.as_ref().map_or("all", |frame| &frame.function);
            *text += &format!("{}{name} {}\n", "  ".repeat(depth), node.ns / 1_000_000);
            node.children.iter().for_each(|&child| add(flame, child, depth + 1, text));
        }
        let mut text = String::new();
        add(flame, Flame::ROOT, 0, &mut text);
        text
    }

    fn blocks() -> Vec<Seen> {
        [("sleep < report < run.loop", 80), ("load < order < run.loop", 30), ("read.dns < load < order < run.loop", 60)]
            .map(|(frames, ms)| {
                let mut block = block("GET /", ms);
                block.blame.stack = stack(frames);
                Seen::Single(block)
            })
            .into()
    }

    #[test]
    fn equal_frames_below_equal_frames_are_one_node() {
        insta::assert_snapshot!(shown(&Flame::of(blocks().iter())), @r"
        all 170
          run.loop 170
            order 90
              load 90
                read.dns 60
            report 80
              sleep 80
        ");
    }

    #[test]
    fn a_node_is_found_again_by_its_path() {
        let flame = Flame::of(blocks().iter());
        let order = flame.find(&stack("load < order < run.loop").frames.iter().rev().cloned().collect::<Vec<_>>());
        assert_eq!(flame.node(order).unwrap().ns, 90_000_000);
        let path = flame.path(order);
        let through: Vec<bool> = blocks().iter().map(|block| runs_through(block, &path)).collect();
        assert_eq!(through, [false, true, true]);
        let smaller = Flame::of(blocks()[..1].iter());
        assert_eq!(smaller.node(smaller.find(&path)).unwrap().frame.as_ref().unwrap().function.as_ref(), "run.loop");
    }

    #[test]
    fn many_library_frames_are_folded() {
        let mut block = block("GET /", 10);
        block.blame.stack = stack("recv < l.d < l.c < l.b < l.a < load < order < f.e < f.d < f.c < f.b < f.a");
        let names: Vec<_> = folded(&block.blame.stack).iter().map(|frame| frame.function.to_string()).collect();
        assert_eq!(names, ["f.a", "...", "f.e", "order", "load", "l.a", "...", "l.d", "recv"]);
        let path = folded(&block.blame.stack);
        assert!(runs_through(&Seen::Single(block), &path));
    }

    #[test]
    fn nothing_is_a_root_without_weight() {
        assert_eq!(Flame::of([].into_iter()).total_ns(), 0);
    }
}
