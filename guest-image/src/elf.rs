//! What is read from ELF files: the libraries and loader of a program, the dependencies of a module.

use std::path::Path;

use object::elf::{DT_NEEDED, DT_RPATH, DT_RUNPATH, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader, SectionHeader};
use object::{Endianness, read};

use crate::ImageError;

/// What a program or library needs at run time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Linkage {
    /// Path of the dynamic loader (`PT_INTERP`), if the file names one.
    pub(crate) loader: Option<String>,
    /// Names of libraries (`DT_NEEDED`).
    pub(crate) libraries: Vec<String>,
    /// Directories that are searched first (`DT_RUNPATH`, `DT_RPATH`).
    pub(crate) search: Vec<String>,
}

/// Reads a program's or library's linkage; a static program has an empty one.
pub(crate) fn linkage(path: &Path, bytes: &[u8]) -> Result<Linkage, ImageError> {
    read_linkage(bytes).map_err(|source| ImageError::Elf { path: path.into(), source })
}

fn read_linkage(bytes: &[u8]) -> read::Result<Linkage> {
    let header = FileHeader64::<Endianness>::parse(bytes)?;
    let endian = header.endian()?;
    let mut linkage = Linkage::default();
    for segment in header.program_headers(endian, bytes)? {
        if let Some(loader) = segment.interpreter(endian, bytes)? {
            linkage.loader = Some(String::from_utf8_lossy(loader).into_owned());
        }
    }
    let sections = header.sections(endian, bytes)?;
    let Some((entries, strings)) = sections.dynamic(endian, bytes)? else { return Ok(linkage) };
    let strings = sections.strings(endian, bytes, strings)?;
    for entry in entries {
        let text = || entry.string(endian, strings).map(|text| String::from_utf8_lossy(text).into_owned());
        match entry.d_tag(endian) {
            DT_NEEDED => linkage.libraries.push(text()?),
            DT_RPATH | DT_RUNPATH => linkage.search.extend(text()?.split(':').map(str::to_owned)),
            _ => {}
        }
    }
    Ok(linkage)
}

/// Names of the modules that a module needs (`depends=` in its section `.modinfo`).
pub(crate) fn module_dependencies(path: &Path, bytes: &[u8]) -> Result<Vec<String>, ImageError> {
    read_module_dependencies(bytes).map_err(|source| ImageError::Elf { path: path.into(), source })
}

fn read_module_dependencies(bytes: &[u8]) -> read::Result<Vec<String>> {
    let header = FileHeader64::<Endianness>::parse(bytes)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, bytes)?;
    let Some((_, section)) = sections.section_by_name(endian, b".modinfo") else { return Ok(Vec::new()) };
    let fields = section.data(endian, bytes)?.split(|byte| *byte == 0);
    let depends =
        fields.filter_map(|field| field.strip_prefix(b"depends=")).flat_map(|list| list.split(|b| *b == b','));
    Ok(depends.filter(|name| !name.is_empty()).map(|name| String::from_utf8_lossy(name).into_owned()).collect())
}

/// A file with a section `.modinfo` of this content and nothing else, as small as a module can be.
#[cfg(test)]
pub(crate) fn module_with_modinfo(modinfo: &[u8]) -> Vec<u8> {
    const HEADER_LEN: u64 = 64;
    const NAMES: &[u8] = b"\0.modinfo\0.shstrtab\0";
    let names_at = HEADER_LEN + modinfo.len() as u64;
    let sections_at = names_at + NAMES.len() as u64;
    // ELF64, little-endian, version 1; relocatable, x86-64 (System V ABI, chapter 4).
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([1_u16, 62].iter().flat_map(|field| field.to_le_bytes()));
    file.extend(1_u32.to_le_bytes());
    file.extend([0, 0, sections_at].iter().flat_map(|field| field.to_le_bytes()));
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 0, 0, 64, 3, 2].iter().flat_map(|field| field.to_le_bytes()));
    file.extend(modinfo);
    file.extend(NAMES);
    // Name, type, then flags, address, offset, size; link, info, alignment and entry size are 0.
    for (name, kind, offset, size) in
        [(0_u32, 0_u32, 0, 0), (1, 1, HEADER_LEN, modinfo.len() as u64), (10, 3, names_at, NAMES.len() as u64)]
    {
        file.extend([name, kind].iter().flat_map(|field| field.to_le_bytes()));
        file.extend([0, 0, offset, size, 0, 0, 0].iter().flat_map(|field: &u64| field.to_le_bytes()));
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        let read = |modinfo: &[u8]| module_dependencies(Path::new("x"), &module_with_modinfo(modinfo)).unwrap();
        assert_eq!(read(b"license=GPL\0depends=vfio,vfio-pci-core\0name=x\0"), ["vfio", "vfio-pci-core"]);
        assert_eq!(read(b"depends=\0"), Vec::<String>::new());
    }

    #[test]
    fn this_test_names_its_loader_and_libraries() {
        let path = std::env::current_exe().unwrap();
        let found = linkage(&path, &std::fs::read(&path).unwrap()).unwrap();
        assert!(found.loader.unwrap().contains("ld-linux"));
        assert!(found.libraries.iter().any(|name| name == "libc.so.6"), "{:?}", found.libraries);
    }

    #[test]
    fn what_is_no_elf_file_is_refused() {
        assert!(linkage(Path::new("x"), b"#!/bin/sh").is_err());
        assert!(module_dependencies(Path::new("x"), &[0x7f, b'E', b'L', b'F']).is_err());
    }
}
