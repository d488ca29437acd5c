//! The list of operations, and what every operation can tell about itself: its name, its operands
//! and how it touches them.
//!
//! What an operation computes is said in `contract/`; what its operands must look like is checked
//! by its `Contract::check_shapes` there and, for aliasing, in `check.rs`.

use crate::contract::*;
use crate::error::OpError;
use crate::view::View;

/// How an operation touches an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read.
    Read,
    /// Every element overwritten; what was there does not matter.
    Write,
    /// Read and written.
    ReadWrite,
}

impl Access {
    /// Whether the old contents matter.
    pub fn reads(self) -> bool {
        self != Access::Write
    }

    /// Whether the contents change.
    pub fn writes(self) -> bool {
        self != Access::Read
    }
}

/// One operand of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// The field's name in the operation's struct.
    pub name: &'static str,
    /// How it is touched.
    pub access: Access,
    /// Where it lies.
    pub view: View,
}

/// What each operation's struct implements.
pub trait Contract {
    /// The operation's name.
    const NAME: OpName;
    /// Every operand that is present, in declaration order.
    fn operands(&self) -> Vec<Operand>;
    /// The same operands' views, to rewrite them.
    fn views_mut(&mut self) -> Vec<&mut View>;
    /// Checks extents, dtypes, strides and attributes.
    fn check_shapes(&self) -> Result<(), OpError>;
}

/// Turns a struct's field into its operands: a view is one, an absent option none.
pub(crate) trait Field {
    fn push(&self, name: &'static str, access: Access, into: &mut Vec<Operand>);
    fn push_mut<'a>(&'a mut self, into: &mut Vec<&'a mut View>);
}

impl Field for View {
    fn push(&self, name: &'static str, access: Access, into: &mut Vec<Operand>) {
        into.push(Operand { name, access, view: *self });
    }

    fn push_mut<'a>(&'a mut self, into: &mut Vec<&'a mut View>) {
        into.push(self);
    }
}

impl Field for Option<View> {
    fn push(&self, name: &'static str, access: Access, into: &mut Vec<Operand>) {
        if let Some(view) = self {
            view.push(name, access, into);
        }
    }

    fn push_mut<'a>(&'a mut self, into: &mut Vec<&'a mut View>) {
        into.extend(self.as_mut());
    }
}

/// Implements [`Contract`] for a struct from a table of its operands and their access.
macro_rules! contract {
    (
        $name:ident |$op:ident, $check:ident| { $($field:ident: $access:expr),* $(,)? }
        $rules:block
    ) => {
        impl $crate::op::Contract for $name {
            const NAME: $crate::op::OpName = $crate::op::OpName::$name;

            fn operands(&self) -> Vec<$crate::op::Operand> {
                let $op = self;
                let mut operands = Vec::new();
                $($crate::op::Field::push(
                    &$op.$field, stringify!($field), $access, &mut operands);)*
                operands
            }

            fn views_mut(&mut self) -> Vec<&mut $crate::view::View> {
                let mut views = Vec::new();
                $($crate::op::Field::push_mut(&mut self.$field, &mut views);)*
                views
            }

            fn check_shapes(&self) -> Result<(), $crate::error::OpError> {
                let $op = self;
                let $check = $crate::check::Check { op: $crate::op::OpName::$name };
                $rules
                Ok(())
            }
        }
    };
}
pub(crate) use contract;

macro_rules! list {
    ($($name:ident),* $(,)?) => {
        /// One operation on the waist. As JSON it is an object of its name and its fields.
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        pub enum Op {
            $(#[doc = concat!("See [`struct@", stringify!($name), "`].")] $name($name),)*
        }

        /// An operation's name without its operands.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum OpName {
            $(#[doc = concat!("See [`struct@", stringify!($name), "`].")] $name,)*
        }

        impl OpName {
            /// Every operation on the waist.
            pub const ALL: &'static [OpName] = &[$(OpName::$name),*];

            /// The name as it stands in reports.
            pub fn name(self) -> &'static str {
                match self { $(OpName::$name => stringify!($name)),* }
            }
        }

        impl Op {
            /// The operation's name.
            pub fn name(&self) -> OpName {
                match self { $(Op::$name(_) => OpName::$name),* }
            }

            /// Every operand that is present, in declaration order.
            pub fn operands(&self) -> Vec<Operand> {
                match self { $(Op::$name(op) => op.operands()),* }
            }

            /// The same operands' views, to rewrite them.
            pub fn views_mut(&mut self) -> Vec<&mut View> {
                match self { $(Op::$name(op) => op.views_mut()),* }
            }

            /// Checks everything that can be checked before running: extents, dtypes, strides,
            /// attributes and that written operands share no memory with others.
            pub fn check(&self) -> Result<(), OpError> {
                match self { $(Op::$name(op) => op.check_shapes()?),* }
                crate::check::overlap(self)
            }
        }

        $(impl From<$name> for Op {
            fn from(op: $name) -> Op {
                Op::$name(op)
            }
        })*
    };
}

impl Op {
    /// The matrix that a product or a head reads whole, row by row, and does not write: what
    /// [`Backend::prepack`](crate::Backend::prepack) is about.
    pub fn matrix(&self) -> Option<&View> {
        match self {
            Op::Matmul(op) if op.layout == Layout::Nt => Some(&op.b),
            Op::MatmulQuant(op) => Some(&op.weight),
            Op::TokenLogProb(op) => Some(&op.head),
            _ => None,
        }
    }
}

list!(
    Copy,
    Cast,
    Fill,
    Add,
    Scale,
    Embed,
    EmbedBwd,
    RmsNorm,
    RmsNormBwd,
    AddRmsNorm,
    AddRmsNormBwd,
    Matmul,
    MatmulQuant,
    GroupedMatmul,
    GroupedMatmulQuant,
    Rope,
    Attention,
    AttentionBwd,
    PagedAttention,
    KvWrite,
    SwiGlu,
    SwiGluBwd,
    RouterTopK,
    RouterTopKBwd,
    Permute,
    PermuteBwd,
    Unpermute,
    UnpermuteBwd,
    CrossEntropy,
    CrossEntropyBwd,
    TokenLogProb,
    TokenLogProbBwd,
    AdamW,
    Muon,
    SumSquares,
    ReduceTree,
    Sample,
    AllReduce,
    AllGather,
    ReduceScatter,
);
