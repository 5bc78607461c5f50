//! Safetensors or GGUF files, mapped, and their tensors by name.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use candle_core::{
    Device,
    quantized::{GgmlDType, ggml_file},
};
use half::{bf16, f16};
use penstock_kernels::MappedFile;
use safetensors::{
    Dtype as FileDtype, SafeTensors,
    tensor::{Metadata, TensorInfo},
};
use serde_json::Value;

use crate::{
    LoadError,
    config::read_object,
    gguf::{self, Gguf},
};

/// A tensor of GGUF files: what each frequency of rotary embeddings is divided by.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// A checkpoint's weight files.
pub(crate) struct Checkpoint {
    gguf: Option<Gguf>,
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
    kind: Kind,
    /// Elements of a row.
    columns: usize,
    /// Width of the heads whose rows lie in pairs: rows 2i and 2i + 1 of a head are i and width / 2 + i of ours.
    paired: Option<usize>,
}

/// How elements are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F32,
    F16,
    Bf16,
    /// Quantized by blocks.
    Blocks(GgmlDType),
}

// === impl Checkpoint ===

impl Checkpoint {
    /// Opens `model.safetensors` in `dir`, or the files that `model.safetensors.index.json` lists, or the GGUF file that
    /// `dir` is or holds.
    pub(crate) fn open(dir: &Path) -> Result<Self, LoadError> {
        if let Some(file) = gguf::find(dir)? {
            let gguf = Gguf::open(file)?;
            return Ok(Self {
                listing: gguf.path().to_owned(),
                gguf: Some(gguf),
                files: Vec::new(),
                tensors: HashMap::new(),
                finite: Mutex::default(),
            });
        }
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
                gguf: None,
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
            gguf: None,
            files,
            tensors,
            listing,
            finite: Mutex::default(),
        })
    }

    /// Bytes of all files.
    pub(crate) fn total_bytes(&self) -> u64 {
        let files: u64 = self.files.iter().map(|file| file.map.len() as u64).sum();
        files + self.gguf.as_ref().map_or(0, Gguf::total_bytes)
    }

    /// What each of `pairs` frequencies of rotary embeddings is divided by, where the checkpoint says so.
    pub(crate) fn rope_factors(&self, pairs: usize) -> Result<Option<Vec<f32>>, LoadError> {
        match &self.gguf {
            Some(gguf) if gguf.has_rope_factors() => {
                let factors = self.tensor(ROPE_FACTORS, &[pairs])?.to_vec(pairs);
                match factors.iter().find(|&&factor| factor <= 0.0) {
                    None => Ok(Some(factors)),
                    Some(factor) => Err(LoadError::Field {
                        path: gguf.path().to_owned(),
                        field: ROPE_FACTORS.to_owned(),
                        problem: format!("has {factor}, which frequencies cannot be divided by"),
                    }),
                }
            }
            _ => Ok(None),
        }
    }

    /// The tensor `name`, of this very shape.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize]) -> Result<Weights<'_>, LoadError> {
        let (path, found, weights) = self.locate(name)?;
        if found != shape {
            return Err(LoadError::Shape {
                tensor: name.to_owned(),
                path: path.to_owned(),
                expected: shape.to_vec(),
                found,
            });
        }
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
                path: path.to_owned(),
                index,
            }),
        }
    }

    /// Where a tensor is, its shape and its bytes.
    fn locate(&self, name: &str) -> Result<(&Path, Vec<usize>, Weights<'_>), LoadError> {
        if let Some(gguf) = &self.gguf {
            let block = gguf.tensor(name)?;
            let weights = Weights {
                data: block.data,
                kind: match block.dtype {
                    GgmlDType::F32 => Kind::F32,
                    GgmlDType::F16 => Kind::F16,
                    GgmlDType::BF16 => Kind::Bf16,
                    quantized => Kind::Blocks(quantized),
                },
                columns: match block.shape.as_slice() {
                    [_, columns] => *columns,
                    _ => 1,
                },
                paired: block.paired,
            };
            return Ok((gguf.path(), block.shape, weights));
        }
        let missing = |path: &Path| LoadError::MissingTensor {
            tensor: name.to_owned(),
            path: path.to_owned(),
        };
        let file = self.tensors.get(name).ok_or_else(|| missing(&self.listing))?;
        let file = &self.files[*file];
        let info = file.metadata.info(name).ok_or_else(|| missing(&file.path))?;
        Ok((&file.path, info.shape.clone(), file.weights(name, info)?))
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
        let kind = match info.dtype {
            FileDtype::F32 => Kind::F32,
            FileDtype::F16 => Kind::F16,
            FileDtype::BF16 => Kind::Bf16,
            _ => {
                return Err(LoadError::TensorDtype {
                    tensor: name.to_owned(),
                    path: self.path.clone(),
                    found: format!("{:?}", info.dtype),
                });
            }
        };
        let (start, end) = info.data_offsets;
        Ok(Weights {
            data: &self.map[self.start + start..self.start + end],
            kind,
            columns: info.shape.last().copied().unwrap_or(1),
            paired: None,
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
        match self.kind {
            Kind::F32 => self.data.len() / 4,
            Kind::F16 | Kind::Bf16 => self.data.len() / 2,
            Kind::Blocks(blocks) => self.data.len() / blocks.type_size() * blocks.block_size(),
        }
    }

    /// The elements from `start` on, as many as `row` holds. Of a matrix whose rows lie in pairs it is one row at most.
    pub(crate) fn read(&self, start: usize, row: &mut [f32]) {
        match self.paired {
            None => self.read_as_it_lies(start, row),
            Some(width) if self.columns > 1 => {
                let (index, column) = (start / self.columns, start % self.columns);
                self.read_as_it_lies(unpaired(index, width) * self.columns + column, row);
            }
            // A vector: each of its elements is a row.
            Some(width) => {
                for (index, value) in row.iter_mut().enumerate() {
                    self.read_as_it_lies(unpaired(start + index, width), std::slice::from_mut(value));
                }
            }
        }
    }

    fn read_as_it_lies(&self, start: usize, row: &mut [f32]) {
        let len = row.len();
        match self.kind {
            Kind::F32 => {
                for (to, from) in row.iter_mut().zip(elements::<4>(self.data, start, len)) {
                    *to = f32::from_le_bytes(*from);
                }
            }
            Kind::F16 => {
                for (to, from) in row.iter_mut().zip(elements::<2>(self.data, start, len)) {
                    *to = f16::from_le_bytes(*from).to_f32();
                }
            }
            Kind::Bf16 => {
                for (to, from) in row.iter_mut().zip(elements::<2>(self.data, start, len)) {
                    *to = bf16::from_le_bytes(*from).to_f32();
                }
            }
            Kind::Blocks(blocks) => {
                let size = blocks.block_size();
                let (first, end) = (start / size, (start + len).div_ceil(size));
                let bytes = &self.data[first * blocks.type_size()..end * blocks.type_size()];
                // What cannot be widened is not finite, and is found before anything is packed.
                let values = widened(blocks, bytes, (end - first) * size)
                    .unwrap_or_else(|_| vec![f32::NAN; (end - first) * size]);
                row.copy_from_slice(&values[start - first * size..][..len]);
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
        match self.kind {
            Kind::F32 => first(self.data, |bytes: [u8; 4]| {
                u32::from_le_bytes(bytes) & 0x7f80_0000 == 0x7f80_0000
            }),
            Kind::F16 => first(self.data, |bytes: [u8; 2]| {
                u16::from_le_bytes(bytes) & 0x7c00 == 0x7c00
            }),
            Kind::Bf16 => first(self.data, |bytes: [u8; 2]| {
                u16::from_le_bytes(bytes) & 0x7f80 == 0x7f80
            }),
            Kind::Blocks(_) => {
                const PART: usize = 1 << 16;
                let mut values = Vec::new();
                (0..self.elements()).step_by(PART).find_map(|start| {
                    values.resize(PART.min(self.elements() - start), 0.0);
                    self.read_as_it_lies(start, &mut values);
                    let wrong = values.iter().position(|value| !value.is_finite());
                    wrong.map(|at| start + at)
                })
            }
        }
    }
}

/// Where row `index` of ours lies among rows in pairs.
fn unpaired(index: usize, width: usize) -> usize {
    let (head, row) = (index / width, index % width);
    let half = width / 2;
    head * width + (row % half) * 2 + row / half
}

/// The values of whole blocks.
fn widened(blocks: GgmlDType, bytes: &[u8], len: usize) -> candle_core::Result<Vec<f32>> {
    ggml_file::qtensor_from_ggml(blocks, bytes, vec![len], &Device::Cpu)?
        .dequantize(&Device::Cpu)?
        .to_vec1()
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
