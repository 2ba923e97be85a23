//! Files of `torch.save`, read without executing anything.
//!
//! A pickle is a program for a stack machine that may call any function. This reader knows the
//! opcodes that state dictionaries need, and no function: three names (`OrderedDict`,
//! `_rebuild_tensor_v2`, `_rebuild_parameter`) stand for what they would build, storages are names of
//! element types, and every other name is refused. Objects live in an arena with one entry an opcode,
//! so memory is linear in the file whatever refers to what.

use std::collections::BTreeMap;

use super::tensors::{Element, Tensor};
use super::zip;

type Id = usize;

#[derive(Debug, Clone)]
enum Node {
    None,
    Int(i64),
    Float(f64),
    Text(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage { element: Element, key: String },
    Tensor(View),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Global {
    OrderedDict,
    Tensor,
    Parameter,
    Storage(Element),
}

/// A tensor as a view of a storage.
#[derive(Debug, Clone)]
struct View {
    element: Element,
    key: String,
    offset: usize,
    shape: Vec<usize>,
    stride: Vec<usize>,
}

/// What a state dictionary holds under a name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Tensor(Tensor),
    Number(f64),
    Text(String),
    Dict(BTreeMap<String, Value>),
    /// A list or nothing: of no use to an SAE.
    Other,
}

/// Deepest nesting of dictionaries that is looked into.
const DEPTH: usize = 3;

/// The dictionary in a file of `torch.save`.
pub(crate) fn state_dict(bytes: &[u8]) -> Result<BTreeMap<String, Value>, String> {
    let entries = zip::entries(bytes)?;
    let (name, program) = entries
        .iter()
        .find(|(name, _)| name.ends_with("data.pkl"))
        .ok_or("it has no data.pkl: not a file of torch.save")?;
    let prefix = &name[..name.len() - "data.pkl".len()];
    let (arena, root) = run(program)?;
    let read = |view: &View| {
        let name = format!("{prefix}data/{}", view.key);
        let data = entries
            .get(&name)
            .ok_or_else(|| format!("storage '{name}' is missing"))?;
        view.read(data)
    };
    dict(&arena, root, &read, DEPTH)
}

fn dict(
    arena: &[Node],
    id: Id,
    read: &dyn Fn(&View) -> Result<Tensor, String>,
    depth: usize,
) -> Result<BTreeMap<String, Value>, String> {
    let Node::Dict(items) = &arena[id] else {
        return Err("it does not hold a dictionary".to_owned());
    };
    let mut out = BTreeMap::new();
    for (key, value) in items {
        let Node::Text(key) = &arena[*key] else {
            // optimiser states are keyed by number
            continue;
        };
        let value = match &arena[*value] {
            Node::Tensor(view) => {
                Value::Tensor(read(view).map_err(|e| format!("tensor '{key}': {e}"))?)
            }
            Node::Int(v) => Value::Number(*v as f64),
            Node::Float(v) => Value::Number(*v),
            Node::Text(v) => Value::Text(v.clone()),
            Node::Dict(_) if depth > 1 => Value::Dict(dict(arena, *value, read, depth - 1)?),
            _ => Value::Other,
        };
        out.insert(key.clone(), value);
    }
    Ok(out)
}

impl View {
    /// Gathers the view's elements from its storage.
    fn read(&self, storage: &[u8]) -> Result<Tensor, String> {
        let whole = storage.len() / self.element.size();
        let too_big = || format!("shape {:?} goes beyond its storage", self.shape);
        if self.shape.len() != self.stride.len() || self.shape.len() > 4 {
            return Err(format!("shape {:?} is not known", self.shape));
        }
        let n = self
            .shape
            .iter()
            .try_fold(1usize, |n, s| n.checked_mul(*s))
            .filter(|n| *n <= whole)
            .ok_or_else(too_big)?;
        let last = self
            .shape
            .iter()
            .zip(&self.stride)
            .try_fold(self.offset, |at, (s, by)| {
                at.checked_add(s.saturating_sub(1).checked_mul(*by)?)
            });
        if n > 0 && last.is_none_or(|last| last >= whole) {
            return Err(too_big());
        }
        let all = self.element.decode(storage);
        let mut data = Vec::with_capacity(n);
        let mut at = vec![0usize; self.shape.len()];
        for _ in 0..n {
            let i = self.offset
                + at.iter()
                    .zip(&self.stride)
                    .map(|(a, s)| a * s)
                    .sum::<usize>();
            data.push(all[i]);
            for (a, s) in at.iter_mut().zip(&self.shape).rev() {
                *a += 1;
                if *a < *s {
                    break;
                }
                *a = 0;
            }
        }
        Ok(Tensor {
            shape: self.shape.clone(),
            data,
        })
    }
}

/// The machine: bytes of the program, an arena, a stack, a memo.
struct Machine<'a> {
    rest: &'a [u8],
    arena: Vec<Node>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: BTreeMap<u32, Id>,
}

fn run(program: &[u8]) -> Result<(Vec<Node>, Id), String> {
    let mut m = Machine {
        rest: program,
        arena: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: BTreeMap::new(),
    };
    loop {
        if let Some(root) = m.step()? {
            return Ok((m.arena, root));
        }
    }
}

impl<'a> Machine<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (front, back) = self
            .rest
            .split_at_checked(n)
            .ok_or("the pickle is cut short")?;
        self.rest = back;
        Ok(front)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.bytes(1)?[0])
    }

    fn u32(&mut self) -> Result<u32, String> {
        let b = self.bytes(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn line(&mut self) -> Result<String, String> {
        let n = self.rest.iter().position(|b| *b == b'\n');
        let line = self.bytes(n.ok_or("the pickle is cut short")?)?;
        self.byte()?;
        Ok(String::from_utf8_lossy(line).into_owned())
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.arena.len());
        self.arena.push(node);
    }

    fn pop(&mut self) -> Result<Id, String> {
        self.stack
            .pop()
            .ok_or_else(|| "the stack is empty".to_owned())
    }

    fn top(&self) -> Result<Id, String> {
        self.stack
            .last()
            .copied()
            .ok_or_else(|| "the stack is empty".to_owned())
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        if mark > self.stack.len() {
            return Err("a mark is beyond the stack".to_owned());
        }
        Ok(self.stack.split_off(mark))
    }

    fn get(&mut self, key: u32) -> Result<(), String> {
        let id = *self.memo.get(&key).ok_or("a memo is missing")?;
        self.stack.push(id);
        Ok(())
    }

    fn tuple(&mut self, n: usize) -> Result<(), String> {
        let from = self
            .stack
            .len()
            .checked_sub(n)
            .ok_or("the stack is empty")?;
        let items = self.stack.split_off(from);
        self.push(Node::Tuple(items));
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), String> {
        let at = self.top()?;
        let Node::Dict(d) = &mut self.arena[at] else {
            return Err("items are set on what is not a dictionary".to_owned());
        };
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err("a key has no value".to_owned());
        };
        d.extend(pairs.iter().map(|[k, v]| (*k, *v)));
        Ok(())
    }

    fn append(&mut self, items: &[Id]) -> Result<(), String> {
        let at = self.top()?;
        let Node::List(l) = &mut self.arena[at] else {
            return Err("items are appended to what is not a list".to_owned());
        };
        l.extend(items);
        Ok(())
    }

    /// One opcode; the root at `STOP`.
    fn step(&mut self) -> Result<Option<Id>, String> {
        match self.byte()? {
            0x80 => match self.byte()? {
                2..=4 => {}
                v => return Err(format!("pickle protocol {v} is not known")),
            },
            0x95 => {
                self.bytes(8)?; // a frame's length
            }
            b'.' => return Ok(Some(self.pop()?)),
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.push(Node::None),
            0x88 => self.push(Node::Int(1)),
            0x89 => self.push(Node::Int(0)),
            b'K' => {
                let v = self.byte()?;
                self.push(Node::Int(v.into()));
            }
            b'M' => {
                let b = self.bytes(2)?;
                self.push(Node::Int(u16::from_le_bytes([b[0], b[1]]).into()));
            }
            b'J' => {
                let v = self.u32()? as i32;
                self.push(Node::Int(v.into()));
            }
            0x8a => {
                let n = usize::from(self.byte()?);
                let b = self.bytes(n)?;
                if n > 8 {
                    return Err("a number has more than 64 bits".to_owned());
                }
                let negative = b.last().is_some_and(|b| b & 0x80 != 0);
                let mut all = [if negative { 0xff } else { 0 }; 8];
                all[..n].copy_from_slice(b);
                self.push(Node::Int(i64::from_le_bytes(all)));
            }
            b'G' => {
                let b = self.bytes(8)?.try_into().unwrap_or_default();
                self.push(Node::Float(f64::from_be_bytes(b)));
            }
            b'X' => {
                let n = self.u32()? as usize;
                let text = String::from_utf8_lossy(self.bytes(n)?).into_owned();
                self.push(Node::Text(text));
            }
            0x8c => {
                let n = usize::from(self.byte()?);
                let text = String::from_utf8_lossy(self.bytes(n)?).into_owned();
                self.push(Node::Text(text));
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            b']' => self.push(Node::List(Vec::new())),
            b')' => self.push(Node::Tuple(Vec::new())),
            b't' => {
                let items = self.since_mark()?;
                self.push(Node::Tuple(items));
            }
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.set_items(&items)?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            b'e' => {
                let items = self.since_mark()?;
                self.append(&items)?;
            }
            b'q' => {
                let key = self.byte()?.into();
                self.memo.insert(key, self.top()?);
            }
            b'r' => {
                let key = self.u32()?;
                self.memo.insert(key, self.top()?);
            }
            0x94 => {
                let key = self.memo.len() as u32;
                self.memo.insert(key, self.top()?);
            }
            b'h' => {
                let key = self.byte()?.into();
                self.get(key)?;
            }
            b'j' => {
                let key = self.u32()?;
                self.get(key)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                let global = global(&module, &name)?;
                self.push(Node::Global(global));
            }
            b'Q' => {
                let id = self.pop()?;
                let node = self.storage(id)?;
                self.push(node);
            }
            b'R' => {
                let (args, f) = (self.pop()?, self.pop()?);
                let node = self.call(f, args)?;
                self.push(node);
            }
            // The state of an OrderedDict is its `_metadata`.
            b'b' => {
                self.pop()?;
                if !matches!(self.arena[self.top()?], Node::Dict(_)) {
                    return Err("state is given to what is not a dictionary".to_owned());
                }
            }
            op => return Err(format!("pickle opcode {op:#04x} is not known")),
        }
        Ok(None)
    }

    fn args(&self, id: Id) -> Result<&[Id], String> {
        match &self.arena[id] {
            Node::Tuple(items) => Ok(items),
            _ => Err("arguments are not a tuple".to_owned()),
        }
    }

    /// `("storage", type, key, device, length)`.
    fn storage(&self, id: Id) -> Result<Node, String> {
        let &[_, ty, key, ..] = self.args(id)? else {
            return Err("a storage has no key".to_owned());
        };
        match (&self.arena[ty], &self.arena[key]) {
            (Node::Global(Global::Storage(element)), Node::Text(key)) => Ok(Node::Storage {
                element: *element,
                key: key.clone(),
            }),
            _ => Err("a storage is not what it should be".to_owned()),
        }
    }

    fn call(&self, f: Id, args: Id) -> Result<Node, String> {
        let Node::Global(global) = self.arena[f] else {
            return Err("what is called is not a function".to_owned());
        };
        let args = self.args(args)?;
        let sizes = |id: Id| -> Result<Vec<usize>, String> {
            let size = |i: &Id| match self.arena[*i] {
                Node::Int(v) => usize::try_from(v).map_err(|_| "a size is negative".to_owned()),
                _ => Err("a size is not a number".to_owned()),
            };
            self.args(id)?.iter().map(size).collect()
        };
        match (global, args) {
            (Global::OrderedDict, []) => Ok(Node::Dict(Vec::new())),
            (Global::Tensor, &[storage, offset, shape, stride, ..]) => {
                let (Node::Storage { element, key }, Node::Int(offset)) =
                    (&self.arena[storage], &self.arena[offset])
                else {
                    return Err("a tensor has no storage".to_owned());
                };
                Ok(Node::Tensor(View {
                    element: *element,
                    key: key.clone(),
                    offset: usize::try_from(*offset).map_err(|_| "an offset is negative")?,
                    shape: sizes(shape)?,
                    stride: sizes(stride)?,
                }))
            }
            (Global::Parameter, &[tensor, ..]) => match &self.arena[tensor] {
                Node::Tensor(view) => Ok(Node::Tensor(view.clone())),
                _ => Err("a parameter is not a tensor".to_owned()),
            },
            _ => Err(format!(
                "{global:?} is called with {} arguments",
                args.len()
            )),
        }
    }
}

fn global(module: &str, name: &str) -> Result<Global, String> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => Global::Tensor,
        ("torch._utils", "_rebuild_parameter") => Global::Parameter,
        ("torch", "FloatStorage") => Global::Storage(Element::F32),
        ("torch", "DoubleStorage") => Global::Storage(Element::F64),
        ("torch", "HalfStorage") => Global::Storage(Element::F16),
        ("torch", "BFloat16Storage") => Global::Storage(Element::Bf16),
        ("torch", "IntStorage") => Global::Storage(Element::I32),
        ("torch", "LongStorage") => Global::Storage(Element::I64),
        _ => {
            return Err(format!(
                "it names {module}.{name}, which is refused: nothing in a pickle is executed"
            ));
        }
    })
}
