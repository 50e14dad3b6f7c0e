//! What the trainer's time goes into.

/// What the trainer's time goes into; it is always in one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading the model and the held-out sets, connecting.
    Setup,
    /// Waiting for documents, and packing them.
    Data,
    /// The forward pass, up to the losses.
    Forward,
    /// Choosing the tokens.
    Select,
    /// The backward pass of the chosen ones.
    Backward,
    /// Clipping and the optimizer's step.
    Optimizer,
    /// Writing down what a step did.
    Log,
    /// Losses on held-out sets, and the token picture.
    Evaluate,
    /// Writing a checkpoint.
    Checkpoint,
}

impl Stage {
    /// Every one.
    pub const ALL: [Self; 9] = [
        Self::Setup,
        Self::Data,
        Self::Forward,
        Self::Select,
        Self::Backward,
        Self::Optimizer,
        Self::Log,
        Self::Evaluate,
        Self::Checkpoint,
    ];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Data => "data",
            Self::Forward => "forward",
            Self::Select => "select",
            Self::Backward => "backward",
            Self::Optimizer => "optimizer",
            Self::Log => "log",
            Self::Evaluate => "evaluate",
            Self::Checkpoint => "checkpoint",
        }
    }
}
