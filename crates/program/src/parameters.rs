//! Where each parameter lies in the weights, gradients and frozen buffers, and under which names
//! its parts stand on disk.
//!
//! All trainable parameters share one layout, so that masters, gradients and moments of the whole
//! model are each one contiguous range: an optimiser is a few operations and a gradient sum is one.

use std::collections::HashMap;

use pontoon_ops::{BufferId, DType, View};

use crate::error::ProgramError;
use crate::program::{FROZEN, GRADIENTS, INTEGERS_ID, SCALES_ID, WEIGHTS};

/// Elements to which every parameter's start is aligned: 64 bytes even in 16-bit dtypes.
const ALIGNMENT_ELEMENTS: usize = 32;
/// Bytes to which integers and scales are aligned.
const ALIGNMENT_BYTES: usize = 64;

/// How a parameter is stored on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// In the programs' float dtype.
    Float,
    /// As integers with one f32 scale per row and group of columns. Cannot be trained.
    Integers {
        /// `I8` or `I4`.
        dtype: DType,
        /// Columns that share a scale.
        group: usize,
    },
}

/// How a parameter is treated by training.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// A matrix inside the network: decayed; orthogonalised under Muon.
    Matrix,
    /// Token embedding or output head: decayed, never orthogonalised.
    Embedding,
    /// A norm's weight or a bias: not decayed.
    Vector,
    /// Loaded, saved and used, but not trained by gradient; always f32.
    Frozen,
}

/// What a model says of one of its parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterSpec {
    /// The name within the program; for stacked experts a pattern with `{}` for the expert.
    pub name: String,
    /// The extents; stacked experts have the expert as first dimension.
    pub shape: Vec<usize>,
    /// How training treats it.
    pub class: Class,
    /// How it is stored.
    pub storage: Storage,
    /// The names on disk: one for the whole, or one for each index of the first dimension.
    pub tensors: Vec<String>,
}

impl ParameterSpec {
    /// A parameter that stands on disk whole, under its own name.
    pub fn whole(name: impl Into<String>, shape: &[usize], class: Class) -> Self {
        let name = name.into();
        let (tensors, shape, storage) = (vec![name.clone()], shape.to_vec(), Storage::Float);
        ParameterSpec { name, shape, class, storage, tensors }
    }

    /// `count` equal tensors stacked along a new first dimension; `{}` in the name is the index.
    pub fn stacked(name: impl Into<String>, count: usize, shape: &[usize], class: Class) -> Self {
        let name = name.into();
        let tensors = (0..count).map(|index| name.replace("{}", &index.to_string())).collect();
        let shape = std::iter::once(count).chain(shape.iter().copied()).collect();
        ParameterSpec { name, shape, class, storage: Storage::Float, tensors }
    }
}

/// A parameter with its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    /// What the model said of it.
    pub spec: ParameterSpec,
    /// Elements from the start of its buffer; of integers, bytes.
    pub element_offset: usize,
    /// Scales from the start of theirs, of integers.
    pub scale_offset: usize,
}

impl Parameter {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.spec.shape.iter().product()
    }

    /// Bytes of the integers and scales of a quantised parameter.
    pub fn quantised_bytes(&self) -> Option<usize> {
        let Storage::Integers { dtype, group } = self.spec.storage else { return None };
        Some(dtype.bytes(self.elements()) + 4 * scales(&self.spec.shape, group))
    }
}

/// The scales of a matrix.
fn scales(shape: &[usize], group: usize) -> usize {
    shape.last().map_or(0, |&width| shape.iter().product::<usize>() / width * width.div_ceil(group))
}

/// One tensor as it stands on disk, and where its elements lie.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSlice {
    /// The name on disk.
    pub name: String,
    /// The extents on disk.
    pub shape: Vec<usize>,
    /// Whether it lies in the frozen buffer.
    pub class: Class,
    /// How it is stored on a device.
    pub storage: Storage,
    /// Elements from the start of its buffer; of integers, bytes.
    pub element_offset: usize,
    /// Scales from the start of theirs, of integers.
    pub scale_offset: usize,
}

impl TensorSlice {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Every parameter of a model, placed.
#[derive(Clone, Debug, PartialEq)]
pub struct ParameterTable {
    parameters: Vec<Parameter>,
    by_name: HashMap<String, usize>,
    trainable_elements: usize,
    frozen_elements: usize,
    integer_bytes: usize,
    scale_count: usize,
    ranges: HashMap<Class, std::ops::Range<usize>>,
}

impl ParameterTable {
    /// Places parameters class by class, in the order given within a class.
    pub fn new(specs: Vec<ParameterSpec>) -> Self {
        let mut specs = specs;
        specs.sort_by_key(|spec| spec.class);
        let mut table = ParameterTable {
            parameters: Vec::with_capacity(specs.len()),
            by_name: HashMap::new(),
            trainable_elements: 0,
            frozen_elements: 0,
            integer_bytes: 0,
            scale_count: 0,
            ranges: HashMap::new(),
        };
        for spec in specs {
            table.place(spec);
        }
        table
    }

    fn place(&mut self, spec: ParameterSpec) {
        let elements: usize = spec.shape.iter().product();
        let (element_offset, scale_offset) = match (spec.storage, spec.class) {
            (Storage::Integers { dtype, group }, _) => {
                let place = (self.integer_bytes, self.scale_count);
                let bytes = dtype.bytes(elements);
                self.integer_bytes = (place.0 + bytes).next_multiple_of(ALIGNMENT_BYTES);
                let count = scales(&spec.shape, group);
                self.scale_count = (place.1 + count).next_multiple_of(ALIGNMENT_BYTES / 4);
                place
            }
            (Storage::Float, Class::Frozen) => {
                let start = self.frozen_elements;
                self.frozen_elements = (start + elements).next_multiple_of(ALIGNMENT_ELEMENTS);
                (start, 0)
            }
            (Storage::Float, Class::Matrix | Class::Embedding | Class::Vector) => {
                let start = self.trainable_elements;
                self.trainable_elements = (start + elements).next_multiple_of(ALIGNMENT_ELEMENTS);
                (start, 0)
            }
        };
        if spec.storage == Storage::Float {
            let end = (element_offset + elements).next_multiple_of(ALIGNMENT_ELEMENTS);
            self.ranges.entry(spec.class).or_insert(element_offset..element_offset).end = end;
        }
        let index = self.parameters.len();
        assert!(
            self.by_name.insert(spec.name.clone(), index).is_none(),
            "parameter `{}` is declared twice",
            spec.name
        );
        self.parameters.push(Parameter { spec, element_offset, scale_offset });
    }

    /// Every parameter, in the order they are placed.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Elements of the weights and gradients buffers, padding included.
    pub fn trainable_elements(&self) -> usize {
        self.trainable_elements
    }

    /// Elements of the frozen buffer, padding included.
    pub fn frozen_elements(&self) -> usize {
        self.frozen_elements
    }

    /// Bytes of the buffer of integers, padding included; 0 if nothing is quantised.
    pub fn integer_bytes(&self) -> usize {
        self.integer_bytes
    }

    /// Values in the buffer of scales, padding included.
    pub fn scale_count(&self) -> usize {
        self.scale_count
    }

    /// Elements of the gradients buffer: a gradient for each trainable element, and after those a
    /// count for each frozen one, by which it may be moved otherwise than by gradient.
    pub fn gradient_elements(&self) -> usize {
        self.trainable_elements + self.frozen_elements
    }

    /// Elements of all parameters, without padding.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(Parameter::elements).sum()
    }

    /// The range of a class in its buffer; empty if the model has none.
    pub fn class_range(&self, class: Class) -> std::ops::Range<usize> {
        self.ranges.get(&class).cloned().unwrap_or(0..0)
    }

    /// A parameter by its name.
    pub fn get(&self, name: &str) -> Result<&Parameter, ProgramError> {
        if let Some(&index) = self.by_name.get(name) {
            return Ok(&self.parameters[index]);
        }
        let shared = |other: &str| {
            let same = |(a, b): &(u8, u8)| a == b;
            let front = name.bytes().zip(other.bytes()).take_while(same).count();
            let back = name.bytes().rev().zip(other.bytes().rev()).take_while(same).count();
            front + back
        };
        let nearest = self.by_name.keys().max_by_key(|other| (shared(other), other.len()));
        Err(ProgramError::UnknownParameter {
            name: name.to_owned(),
            nearest: nearest.cloned().unwrap_or_default(),
        })
    }

    /// The parameter's view in the weights buffer (of `dtype`), the frozen one (f32), or that of
    /// integers.
    pub fn weight(&self, name: &str, dtype: DType) -> Result<View, ProgramError> {
        let parameter = self.get(name)?;
        if let Storage::Integers { dtype, .. } = parameter.spec.storage {
            let view = View::contiguous(INTEGERS_ID, dtype, parameter.spec.shape.as_slice());
            return Ok(view.rebased(INTEGERS_ID, parameter.element_offset));
        }
        Ok(match parameter.spec.class {
            Class::Frozen => place(parameter, FROZEN, DType::F32),
            _ => place(parameter, WEIGHTS, dtype),
        })
    }

    /// The scales of the quantised parameter that a view shows, and how many columns share one.
    pub fn scales_of(&self, weight: &View) -> Option<(View, usize)> {
        if weight.buffer != INTEGERS_ID {
            return None;
        }
        self.parameters.iter().find_map(|parameter| {
            let Storage::Integers { group, .. } = parameter.spec.storage else { return None };
            let mut shape = parameter.spec.shape.clone();
            let width = shape.last_mut()?;
            *width = width.div_ceil(group);
            (parameter.element_offset == weight.byte_offset).then(|| {
                let view = View::contiguous(SCALES_ID, DType::F32, shape.as_slice());
                (view.rebased(SCALES_ID, 4 * parameter.scale_offset), group)
            })
        })
    }

    /// The gradient's view in the gradients buffer; a frozen parameter's counts.
    pub fn gradient(&self, name: &str) -> Result<View, ProgramError> {
        let parameter = self.get(name)?;
        let view = place(parameter, GRADIENTS, DType::F32);
        Ok(match parameter.spec.class {
            Class::Frozen => view.rebased(GRADIENTS, DType::F32.bytes(self.trainable_elements)),
            _ => view,
        })
    }

    /// Every tensor as it stands on disk, in name order.
    pub fn tensors(&self) -> Vec<TensorSlice> {
        let mut slices: Vec<TensorSlice> = self.parameters.iter().flat_map(tensor_slices).collect();
        slices.sort_by(|a, b| a.name.cmp(&b.name));
        slices
    }
}

fn place(parameter: &Parameter, buffer: BufferId, dtype: DType) -> View {
    View::contiguous(buffer, dtype, parameter.spec.shape.as_slice())
        .rebased(buffer, dtype.bytes(parameter.element_offset))
}

fn tensor_slices(parameter: &Parameter) -> Vec<TensorSlice> {
    let spec = &parameter.spec;
    let stacked = spec.tensors.len() > 1 || spec.name.contains("{}");
    let shape = if stacked { &spec.shape[1..] } else { &spec.shape[..] };
    let elements: usize = shape.iter().product();
    // Of integers, places are bytes; each tensor's own are whole, as its rows are.
    let (step, scale_step) = match spec.storage {
        Storage::Float => (elements, 0),
        Storage::Integers { dtype, group } => (dtype.bytes(elements), scales(shape, group)),
    };
    let slice = |(index, name): (usize, &String)| TensorSlice {
        name: name.clone(),
        shape: shape.to_vec(),
        class: spec.class,
        storage: spec.storage,
        element_offset: parameter.element_offset + index * step,
        scale_offset: parameter.scale_offset + index * scale_step,
    };
    spec.tensors.iter().enumerate().map(slice).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> ParameterTable {
        ParameterTable::new(vec![
            ParameterSpec::whole("norm.weight", &[5], Class::Vector),
            ParameterSpec::stacked("experts.{}.up", 3, &[2, 5], Class::Matrix),
            ParameterSpec::whole("router.bias", &[3], Class::Frozen),
            ParameterSpec::whole("head", &[7, 5], Class::Embedding),
        ])
    }

    #[test]
    fn classes_are_contiguous_and_aligned() {
        let table = table();
        assert_eq!(table.class_range(Class::Matrix), 0..32);
        assert_eq!(table.class_range(Class::Embedding), 32..96);
        assert_eq!(table.class_range(Class::Vector), 96..128);
        assert_eq!(table.trainable_elements(), 128);
        assert_eq!(table.frozen_elements(), 32);
        assert_eq!(table.gradient_elements(), 160);
        assert_eq!(table.gradient("router.bias").unwrap().byte_offset, 4 * 128);
        assert_eq!(table.parameter_count(), 5 + 30 + 3 + 35);
    }

    #[test]
    fn stacked_experts_stand_on_disk_one_by_one() {
        let tensors = table().tensors();
        let up = tensors.iter().find(|t| t.name == "experts.2.up").expect("it is there");
        assert_eq!((up.shape.as_slice(), up.element_offset), ([2, 5].as_slice(), 20));
    }

    #[test]
    fn quantised_parameters_lie_apart_and_are_found_by_their_view() {
        let storage = Storage::Integers { dtype: DType::I4, group: 32 };
        let matrix = |name: &str, rows: usize| ParameterSpec {
            storage,
            ..ParameterSpec::whole(name, &[rows, 40], Class::Matrix)
        };
        let norm = ParameterSpec::whole("norm", &[40], Class::Vector);
        let table = ParameterTable::new(vec![matrix("a", 3), norm, matrix("b", 7)]);
        assert_eq!((table.integer_bytes(), table.trainable_elements()), (64 + 192, 64));
        let view = table.weight("b", DType::Bf16).unwrap();
        assert_eq!((view.dtype, view.byte_offset, view.dims()), (DType::I4, 64, &[7, 40][..]));
        let (scales, group) = table.scales_of(&view).unwrap();
        assert_eq!((scales.dims(), scales.byte_offset, group), (&[7, 2][..], 64, 32));
        assert_eq!(table.scales_of(&table.weight("norm", DType::Bf16).unwrap()), None);
        assert_eq!(table.get("b").unwrap().quantised_bytes(), Some(140 + 56));
    }

    #[test]
    fn quantised_experts_have_integers_and_scales_of_their_own() {
        let storage = Storage::Integers { dtype: DType::I4, group: 32 };
        let experts = ParameterSpec::stacked("experts.{}.up", 3, &[5, 40], Class::Matrix);
        let table = ParameterTable::new(vec![ParameterSpec { storage, ..experts }]);
        let view = table.weight("experts.{}.up", DType::Bf16).unwrap();
        let (scales, group) = table.scales_of(&view).unwrap();
        assert_eq!((view.dims(), scales.dims(), group), (&[3, 5, 40][..], &[3, 5, 2][..], 32));
        let places: Vec<_> =
            table.tensors().iter().map(|t| (t.element_offset, t.scale_offset)).collect();
        assert_eq!(places, [(0, 0), (100, 10), (200, 20)]);
    }

    #[test]
    fn a_misspelt_parameter_names_the_nearest_one() {
        let error = table().get("norm.wieght").unwrap_err();
        assert!(error.to_string().contains("`norm.weight`"), "{error}");
    }
}
