//! What an unpacked layer needs from those below it, while it waits for them. That may be a hundred megabytes, and hundreds of layers
//! may wait for one that is slow: it goes to the disk when it is more than a little.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};

use crate::layout::{Ingest, Layout};
use crate::unpack::Unpacked;
use crate::{Error, Result, Usage};

/// So many bytes stay in memory.
const LITTLE: usize = 64 << 10;

pub(crate) enum Needs {
    Little(Unpacked),
    Much(Usage, Ingest),
}

impl Needs {
    /// Blocking code.
    pub fn keep(layout: &Layout, unpacked: Unpacked) -> Result<Needs> {
        let size = |bytes: &Vec<u8>| size_of::<Vec<u8>>() + bytes.len();
        let links = unpacked.borrow.iter().map(|(path, target)| size(path) + size(target));
        if unpacked.inherit.iter().map(size).chain(links).sum::<usize>() <= LITTLE {
            return Ok(Needs::Little(unpacked));
        }
        let file = layout.ingest();
        write(&file, &unpacked).map_err(Error::io("write", &file.path))?;
        Ok(Needs::Much(unpacked.usage, file))
    }

    /// All of it again. Blocking code.
    pub fn take(self) -> Result<Unpacked> {
        match self {
            Needs::Little(unpacked) => Ok(unpacked),
            Needs::Much(usage, file) => read(usage, &file).map_err(Error::io("read", &file.path)),
        }
    }
}

fn write(to: &Ingest, unpacked: &Unpacked) -> io::Result<()> {
    let mut out = BufWriter::new(File::create_new(&to.path)?);
    let mut put = |bytes: &[u8]| {
        out.write_all(&(bytes.len() as u64).to_le_bytes())?;
        out.write_all(bytes)
    };
    for path in &unpacked.inherit {
        put(path)?;
    }
    // No folder has this name: it is the end of the first list.
    put(b"/")?;
    for (path, target) in &unpacked.borrow {
        put(path)?;
        put(target)?;
    }
    out.flush()
}

fn read(usage: Usage, from: &Ingest) -> io::Result<Unpacked> {
    let file = File::open(&from.path)?;
    let mut left = file.metadata()?.len();
    let mut file = BufReader::new(file);
    let mut get = || -> io::Result<Option<Vec<u8>>> {
        if left == 0 {
            return Ok(None);
        }
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        left = left.checked_sub(8 + length).ok_or(io::ErrorKind::InvalidData)?;
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes)?;
        Ok(Some(bytes))
    };
    let mut unpacked = Unpacked { usage, ..Unpacked::default() };
    while let Some(path) = get()?.filter(|p| p != b"/") {
        unpacked.inherit.push(path);
    }
    while let Some(path) = get()? {
        let target = get()?.ok_or(io::ErrorKind::InvalidData)?;
        unpacked.borrow.push((path, target));
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn much_goes_to_the_disk_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let unpacked = |links: usize| Unpacked {
            usage: Usage { bytes: 7, inodes: 8 },
            inherit: vec![b"".to_vec(), b"a".to_vec(), b"a/\xff\n".to_vec()],
            borrow: (0..links).map(|n| (format!("l{n}").into_bytes(), vec![b'x'; n % 4000])).collect(),
        };
        for (links, files) in [(0, 0), (10, 0), (1000, 1)] {
            let before = unpacked(links);
            let needs = Needs::keep(&layout, unpacked(links)).unwrap();
            assert_eq!(std::fs::read_dir(layout.root.join("ingest")).unwrap().count(), files);
            let after = needs.take().unwrap();
            assert_eq!(after.usage, before.usage);
            assert!(after.inherit == before.inherit && after.borrow == before.borrow);
            assert_eq!(std::fs::read_dir(layout.root.join("ingest")).unwrap().count(), 0);
        }
    }
}
