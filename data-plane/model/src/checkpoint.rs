//! Safetensors files, mapped, and their tensors by name.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use half::{bf16, f16};
use penstock_kernels::MappedFile;
use safetensors::{
    Dtype as FileDtype, SafeTensors,
    tensor::{Metadata, TensorInfo},
};
use serde_json::Value;

use crate::{LoadError, config::read_object};

/// A checkpoint's weight files.
pub(crate) struct Checkpoint {
    files: Vec<File>,
    /// Index into `files` by tensor.
    tensors: HashMap<String, usize>,
    /// What lists the tensors: the index, or the only file.
    listing: PathBuf,
    /// Tensors that were looked through and are finite: each rank reads its part of them.
    finite: Mutex<HashSet<String>>,
}

struct File {
    path: PathBuf,
    map: MappedFile,
    metadata: Metadata,
    /// Where the tensors' bytes start.
    start: usize,
}

/// One tensor's bytes. It is contiguous, row-major and finite.
pub(crate) struct Weights<'a> {
    data: &'a [u8],
    dtype: FileDtype,
}

// === impl Checkpoint ===

impl Checkpoint {
    /// Opens `model.safetensors` in `dir`, or the files that `model.safetensors.index.json` lists.
    pub(crate) fn open(dir: &Path) -> Result<Self, LoadError> {
        let index = dir.join("model.safetensors.index.json");
        let single = dir.join("model.safetensors");
        if index.exists() {
            Self::sharded(dir, index)
        } else if single.exists() {
            let file = File::open(single.clone())?;
            let tensors = file
                .metadata
                .offset_keys()
                .into_iter()
                .map(|name| (name, 0))
                .collect();
            Ok(Self {
                files: vec![file],
                tensors,
                listing: single,
                finite: Mutex::default(),
            })
        } else {
            Err(LoadError::NoWeights { dir: dir.to_owned() })
        }
    }

    fn sharded(dir: &Path, listing: PathBuf) -> Result<Self, LoadError> {
        let document = read_object(&listing)?;
        let field = |field: &str, problem: String| LoadError::Field {
            path: listing.clone(),
            field: field.to_owned(),
            problem,
        };
        let Some(Value::Object(map)) = document.get("weight_map") else {
            return Err(field(
                "weight_map",
                "must be an object of tensor names and file names".into(),
            ));
        };
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let (mut files, mut tensors) = (Vec::new(), HashMap::new());
        for (tensor, name) in map {
            let name = name
                .as_str()
                .filter(|name| Path::new(name).file_name().is_some_and(|file| file == *name));
            let Some(name) = name else {
                return Err(field(
                    &format!("weight_map.{tensor}"),
                    "must be the name of a file beside it".into(),
                ));
            };
            let number = match numbers.get(name) {
                Some(&number) => number,
                None => {
                    files.push(File::open(dir.join(name))?);
                    numbers.insert(name, files.len() - 1);
                    files.len() - 1
                }
            };
            tensors.insert(tensor.clone(), number);
        }
        Ok(Self {
            files,
            tensors,
            listing,
            finite: Mutex::default(),
        })
    }

    /// Bytes of all files.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.map.len() as u64).sum()
    }

    /// The tensor `name`, of this very shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Weights<'_>, LoadError> {
        let missing = |path: &Path| LoadError::MissingTensor {
            tensor: name.to_owned(),
            path: path.to_owned(),
        };
        let file = self.tensors.get(name).ok_or_else(|| missing(&self.listing))?;
        let file = &self.files[*file];
        let info = file.metadata.info(name).ok_or_else(|| missing(&file.path))?;
        if info.shape != shape {
            return Err(LoadError::Shape {
                tensor: name.to_owned(),
                path: file.path.clone(),
                expected: shape.to_vec(),
                found: info.shape.clone(),
            });
        }
        let weights = file.weights(name, info)?;
        let mut finite = self.finite.lock().unwrap_or_else(PoisonError::into_inner);
        if finite.contains(name) {
            return Ok(weights);
        }
        match weights.first_not_finite() {
            None => {
                finite.insert(name.to_owned());
                Ok(weights)
            }
            Some(index) => Err(LoadError::NotFinite {
                tensor: name.to_owned(),
                path: file.path.clone(),
                index,
            }),
        }
    }
}

// === impl File ===

impl File {
    fn open(path: PathBuf) -> Result<Self, LoadError> {
        let map = match MappedFile::open(&path) {
            Ok(map) => map,
            Err(source) => return Err(LoadError::Read { path, source }),
        };
        match SafeTensors::read_metadata(&map) {
            // A length of 8 bytes, the header, the tensors.
            Ok((header, metadata)) => Ok(Self {
                path,
                map,
                metadata,
                start: 8 + header,
            }),
            Err(source) => Err(LoadError::Safetensors {
                path,
                bytes: map.len(),
                source,
            }),
        }
    }

    fn weights(&self, name: &str, info: &TensorInfo) -> Result<Weights<'_>, LoadError> {
        if !matches!(info.dtype, FileDtype::BF16 | FileDtype::F16 | FileDtype::F32) {
            return Err(LoadError::TensorDtype {
                tensor: name.to_owned(),
                path: self.path.clone(),
                found: format!("{:?}", info.dtype),
            });
        }
        let (start, end) = info.data_offsets;
        Ok(Weights {
            data: &self.map[self.start + start..self.start + end],
            dtype: info.dtype,
        })
    }
}

// === impl Weights ===

impl Weights<'_> {
    /// Bytes in the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.data.len() as u64
    }

    /// Number of elements.
    pub(crate) fn elements(&self) -> usize {
        let width = match self.dtype {
            FileDtype::F32 => 4,
            _ => 2,
        };
        self.data.len() / width
    }

    /// The elements from `start` on, as many as `row` holds.
    pub(crate) fn read(&self, start: usize, row: &mut [f32]) {
        let len = row.len();
        match self.dtype {
            FileDtype::F32 => {
                for (to, from) in row.iter_mut().zip(elements::<4>(self.data, start, len)) {
                    *to = f32::from_le_bytes(*from);
                }
            }
            FileDtype::F16 => {
                for (to, from) in row.iter_mut().zip(elements::<2>(self.data, start, len)) {
                    *to = f16::from_le_bytes(*from).to_f32();
                }
            }
            _ => {
                for (to, from) in row.iter_mut().zip(elements::<2>(self.data, start, len)) {
                    *to = bf16::from_le_bytes(*from).to_f32();
                }
            }
        }
    }

    /// A vector.
    pub(crate) fn to_vec(&self, len: usize) -> Vec<f32> {
        self.range(0..len)
    }

    /// A part of a vector.
    pub(crate) fn range(&self, range: Range<usize>) -> Vec<f32> {
        let mut values = vec![0.0; range.len()];
        self.read(range.start, &mut values);
        values
    }

    fn first_not_finite(&self) -> Option<usize> {
        match self.dtype {
            FileDtype::F32 => first(self.data, |bytes: [u8; 4]| {
                u32::from_le_bytes(bytes) & 0x7f80_0000 == 0x7f80_0000
            }),
            FileDtype::F16 => first(self.data, |bytes: [u8; 2]| {
                u16::from_le_bytes(bytes) & 0x7c00 == 0x7c00
            }),
            _ => first(self.data, |bytes: [u8; 2]| {
                u16::from_le_bytes(bytes) & 0x7f80 == 0x7f80
            }),
        }
    }
}

/// `len` elements of W bytes from element `start` on.
fn elements<const W: usize>(data: &[u8], start: usize, len: usize) -> &[[u8; W]] {
    data[start * W..][..len * W].as_chunks().0
}

/// The first element for which `wrong` holds. Looks at blocks without branches first, which vectorises.
fn first<const W: usize>(data: &[u8], wrong: impl Fn([u8; W]) -> bool) -> Option<usize> {
    const BLOCK: usize = 4096;
    let elements = data.as_chunks::<W>().0;
    for (block, values) in elements.chunks(BLOCK).enumerate() {
        if values.iter().fold(false, |any, &value| any | wrong(value)) {
            return values
                .iter()
                .position(|&value| wrong(value))
                .map(|at| block * BLOCK + at);
        }
    }
    None
}
