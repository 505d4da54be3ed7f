//! Images in the format qcow2, judged by qemu-img.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::driver::{DATA, FrontEnd, Queue, Req, noise};
use crate::process::{ImageFile, LoopDevice, Program, disk_directory};

const MIB: u64 = 1 << 20;

/// Requests that are offered at a time.
const AT_A_TIME: u64 = 12;

fn tool(name: &str, arguments: &[&str]) -> Output {
    let program = match vvu_setup::Setup::load() {
        Ok(setup) if name == "qemu-io" => setup.qemu_io,
        Ok(setup) => setup.qemu_img,
        Err(_) => PathBuf::from(name),
    };
    Command::new(program).args(arguments).output().unwrap()
}

fn qemu_img(arguments: &[&str]) -> String {
    let output = tool("qemu-img", arguments);
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    text
}

/// An image in a directory of its own.
pub(crate) struct Qcow2Image {
    directory: tempfile::TempDir,
}

impl Qcow2Image {
    /// Made by qemu-img, with further arguments.
    pub(crate) fn create(len: u64, arguments: &[&str]) -> Self {
        let image = Self { directory: disk_directory() };
        let (path, len) = (image.path(), len.to_string());
        qemu_img(&[&["create", "-q", "-f", "qcow2"], arguments, &[path.to_str().unwrap(), &len]].concat());
        image
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("disk.qcow2")
    }

    fn file(&self) -> std::fs::File {
        std::fs::OpenOptions::new().read(true).write(true).open(self.path()).unwrap()
    }

    /// A raw image with the same content, made by qemu-img.
    pub(crate) fn as_raw(&self) -> PathBuf {
        let raw = self.directory.path().join("disk.raw");
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", self.path().to_str().unwrap(), raw.to_str().unwrap()]);
        raw
    }

    /// Nothing is wrong with the image.
    fn check(&self) {
        let text = qemu_img(&["check", "-f", "qcow2", self.path().to_str().unwrap()]);
        assert!(text.contains("No errors were found"), "{text}");
    }

    /// Nothing is wrong with the image but clusters that are not used.
    pub(crate) fn check_but_for_leaks(&self) {
        let output = tool("qemu-img", &["check", "-f", "qcow2", self.path().to_str().unwrap()]);
        // 0: sound; 3: leaks, and nothing else (qemu-img(1)).
        assert!(matches!(output.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&output.stdout));
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.as_raw()).unwrap()
    }
}

/// Numbers without a pattern.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A driver, and what its disk must hold.
struct Model {
    front_end: FrontEnd,
    queues: Vec<Queue>,
    content: Vec<u8>,
    random: Random,
}

impl Model {
    fn new(program: &Program, content: Vec<u8>, seed: u64) -> Self {
        let mut front_end = FrontEnd::connect(program);
        let queues = vec![front_end.queue(0, 256), front_end.queue(1, 256)];
        Self { front_end, queues, content, random: Random(seed) }
    }

    /// Rounds of requests that are in flight together, each with a stretch of the disk of its own, then a stop.
    fn work(&mut self, rounds: usize) {
        for _ in 0..rounds {
            self.round();
        }
        for queue in &self.queues {
            queue.stop(&self.front_end);
        }
    }

    fn round(&mut self) {
        let sectors = self.content.len() as u64 / 512 / AT_A_TIME;
        let mut expected = BTreeMap::new();
        for index in 0..AT_A_TIME {
            let start = index * sectors + self.random.below(sectors);
            let most = (sectors - start % sectors).min(512);
            let most = if self.random.below(2) == 0 { most } else { most.min(8) };
            let len = 1 + self.random.below(most);
            let range = (start * 512) as usize..((start + len) * 512) as usize;
            // A third of the memory is not fit for direct I/O.
            let address = DATA + index * MIB + if self.random.below(3) == 0 { 2 } else { 0 };
            let queue = (index % 2) as usize;
            let head = (index * 4) as u16;
            let request = match self.random.below(8) {
                0..3 => {
                    let data = noise(range.len(), self.random.below(u64::MAX));
                    self.front_end.fill(address, &data);
                    self.content[range].copy_from_slice(&data);
                    Req::write(start, address, (len * 512) as u32)
                }
                3 => {
                    self.content[range].fill(0);
                    let unmap = self.random.below(2) as u32;
                    let ranges = [&start.to_le_bytes()[..], &(len as u32).to_le_bytes(), &unmap.to_le_bytes()].concat();
                    self.front_end.fill(address, &ranges);
                    Req::ranges(13, address, 16)
                }
                4 => Req::flush(),
                _ => {
                    expected.insert(head, (address, range));
                    Req::read(start, address, (len * 512) as u32)
                }
            };
            self.queues[queue].offer_request(&self.front_end.memory, head, &request);
        }
        for queue in &self.queues {
            queue.publish(&self.front_end.memory);
            queue.kick();
        }
        for _ in 0..AT_A_TIME / 2 {
            for queue in &mut self.queues {
                let (head, _) = queue.wait_used(&self.front_end.memory);
                assert_eq!(queue.status(&self.front_end.memory, head), 0, "head {head}");
            }
        }
        for (head, (address, range)) in expected {
            let read = self.front_end.bytes(address, range.len());
            assert!(read == self.content[range.clone()], "head {head} has read something else at {range:?}");
        }
    }
}

#[test]
fn what_the_driver_does_is_what_qemu_finds() {
    const LEN: u64 = 24 * MIB;
    for (index, options) in ["cluster_size=64k", "cluster_size=4k,refcount_bits=64", "compat=0.10"].iter().enumerate() {
        let image = Qcow2Image::create(LEN, &["-o", options]);
        let program = Program::start(&image.path(), &["--queues", "2", "--format", "qcow2"]);
        let mut model = Model::new(&program, vec![0; LEN as usize], index as u64 + 7);
        model.work(60);
        // The rings are stopped, so all of it is there, although the program goes on.
        image.check();
        assert!(image.content() == model.content, "{options}: qemu-img finds something else");
        // And what another program writes now is seen from the next start on.
        let written = tool("qemu-io", &["-f", "qcow2", "-c", "write -P 77 1M 1M", image.path().to_str().unwrap()]);
        assert!(written.status.success());
        model.content[MIB as usize..2 * MIB as usize].fill(77);
        for queue in &mut model.queues {
            let base = queue.used_index(&model.front_end.memory);
            queue.start(&mut model.front_end, base);
        }
        model.work(20);
        assert!(image.content() == model.content, "{options}: qemu-img finds something else after the second start");
        image.check();
        assert_eq!(program.counter("io_errors"), 0);
        assert!(program.counter("zero_copy_bytes") + program.counter("page_cache_bytes") > 0);
        assert!(program.counter("bounced_bytes") > 0 || program.counter("page_cache_bytes") > 0);
    }
}

/// As in an appliance: the device is longer than the image is yet. Its blocks are larger than the driver's sectors.
#[test]
fn an_image_on_a_block_device_grows_into_it_and_ends_where_the_device_does() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not root: no loop device, left to the whole-machine tests");
        return;
    }
    const LEN: u64 = 12 * MIB;
    let image = Qcow2Image::create(LEN, &["-o", "cluster_size=16k"]);
    // Tables and all.
    image.file().set_len(LEN + 4 * MIB).unwrap();
    let device = LoopDevice::new(&image.path());
    let program = Program::start(Path::new(&device.path), &["--queues", "2", "--format", "qcow2"]);
    let mut model = Model::new(&program, vec![0; LEN as usize], 31);
    model.work(60);
    drop((program, device));
    image.check();
    assert!(image.content() == model.content);

    let image = Qcow2Image::create(LEN, &[]);
    image.file().set_len(2 * MIB).unwrap();
    let device = LoopDevice::new(&image.path());
    let program = Program::start(Path::new(&device.path), &["--format", "qcow2"]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    let statuses: Vec<u8> = (0..LEN / MIB)
        .map(|index| queue.run(&front_end.memory, &Req::write(index * 2048, DATA, MIB as u32)).0)
        .collect();
    assert!(statuses.starts_with(&[0]) && statuses.ends_with(&[1]), "{statuses:?}");
    queue.run_ok(&front_end.memory, &Req::read(0, DATA, MIB as u32));
    queue.run_ok(&front_end.memory, &Req::flush());
    queue.stop(&front_end);
    drop((program, device));
    image.check_but_for_leaks();
}

#[test]
fn a_chain_of_backing_files_is_read_through_and_only_the_image_is_written() {
    const LEN: u64 = 12 * MIB;
    let base = ImageFile::new(4 * MIB);
    let content = noise(4 * MIB as usize, 3);
    std::fs::write(base.path(), &content).unwrap();
    let name = |path: &Path| path.to_str().unwrap().to_owned();
    // Each is longer than the one below, and each name is wrong where the program runs: it does not follow them.
    let middle = Qcow2Image::create(8 * MIB, &["-b", &name(&base.path()), "-F", "raw"]);
    let raw = format!("raw:{}", name(&base.path()));
    let mut whole = [content.clone(), vec![0; 8 * MIB as usize]].concat();
    let program = Program::start(&middle.path(), &["--queues", "2", "--format", "qcow2", "--backing", &raw]);
    let mut model = Model::new(&program, whole[..8 * MIB as usize].to_vec(), 11);
    model.work(20);
    whole[..8 * MIB as usize].copy_from_slice(&model.content);
    drop((model, program));
    middle.check();
    let middle_bytes = std::fs::read(middle.path()).unwrap();

    let top = Qcow2Image::create(LEN, &["-o", "cluster_size=1M", "-b", &name(&middle.path()), "-F", "qcow2"]);
    let qcow2 = format!("qcow2:{}", name(&middle.path()));
    let arguments = ["--queues", "2", "--format", "qcow2", "--backing", &qcow2, "--backing", &raw];
    let program = Program::start(&top.path(), &arguments);
    let mut model = Model::new(&program, whole, 12);
    model.work(40);
    top.check();
    assert!(top.content() == model.content);
    assert!(std::fs::read(middle.path()).unwrap() == middle_bytes, "a backing file was written to");
    assert!(std::fs::read(base.path()).unwrap() == content, "a backing file was written to");
}

#[test]
fn a_compressed_image_and_one_with_a_snapshot_are_served() {
    let source = ImageFile::new(4 * MIB);
    std::fs::write(source.path(), vec![b'a'; 3 * MIB as usize]).unwrap();
    source.resize(4 * MIB);
    let content = source.content();
    let image = Qcow2Image::create(4 * MIB, &[]);
    let path = image.path().to_str().unwrap().to_owned();
    qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", source.path().to_str().unwrap(), &path]);
    qemu_img(&["snapshot", "-c", "before", &path]);
    let program = Program::start(&image.path(), &["--queues", "2", "--format", "qcow2"]);
    let mut model = Model::new(&program, content.clone(), 21);
    model.work(30);
    drop(program);
    image.check();
    assert!(image.content() == model.content);
    qemu_img(&["snapshot", "-a", "before", &path]);
    assert!(image.content() == content, "the snapshot was written to");
}

#[test]
fn a_read_only_image_is_read_and_not_written_to() {
    let image = Qcow2Image::create(MIB, &[]);
    let before = std::fs::read(image.path()).unwrap();
    let program = Program::start(&image.path(), &["--read-only", "--format", "qcow2"]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    front_end.fill(DATA, &[1; 4096]);
    queue.run_ok(&front_end.memory, &Req::read(8, DATA, 4096));
    assert_eq!(front_end.bytes(DATA, 4096), [0; 4096]);
    assert_eq!(queue.run(&front_end.memory, &Req::write(8, DATA, 4096)).0, 1);
    queue.stop(&front_end);
    drop(program);
    assert!(std::fs::read(image.path()).unwrap() == before);
}

/// Arguments that must not lead to a start; returns the line that says why.
fn refusal(image: &Path, arguments: &[&str]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vvu-blk"));
    command.arg("--socket-path").arg(directory.path().join("socket")).arg("--image").arg(image).args(arguments);
    let output = command.env("RUST_LOG", "off").output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

#[test]
fn what_does_not_fit_together_is_refused_with_a_remedy() {
    let raw = ImageFile::new(MIB);
    let plain = Qcow2Image::create(MIB, &[]);
    let backed = Qcow2Image::create(MIB, &["-b", raw.path().to_str().unwrap(), "-F", "raw"]);
    let data = disk_directory();
    let data_file = format!("data_file={}", data.path().join("data.raw").display());
    let elsewhere = Qcow2Image::create(MIB, &["-o", &data_file]);
    let extended = Qcow2Image::create(MIB, &["-o", "extended_l2=on"]);
    let dirty = Qcow2Image::create(MIB, &[]);
    dirty.file().write_all_at(&[1], 79).unwrap();
    let backing = format!("raw:{}", raw.path().display());
    for (image, arguments, expected) in [
        (raw.path(), vec![], "is no qcow2 image"),
        (backed.path(), vec![], "name it with --backing"),
        (plain.path(), vec!["--backing", &backing], "leave it out"),
        (backed.path(), vec!["--backing", &backing, "--backing", &backing], "leave it out"),
        (elsewhere.path(), vec![], "data in another file"),
        (extended.path(), vec![], "qemu-img convert"),
        (dirty.path(), vec![], "qemu-img check -r all"),
    ] {
        let line = refusal(&image, &[&["--format", "qcow2"], &arguments[..]].concat());
        assert!(line.contains(expected), "{line}");
    }
}

/// How often the threads of the format's driver have gone to sleep.
fn driver_switches(program: &Program) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", program.id())).unwrap().flatten().map(|task| task.path());
    let drivers = tasks.filter(|task| std::fs::read_to_string(task.join("comm")).unwrap().starts_with("qcow2-"));
    let status = drivers.map(|task| std::fs::read_to_string(task.join("status")).unwrap());
    let switches =
        |text: String| text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")?.trim().parse().ok());
    status.map(|text| switches(text).unwrap_or(0u64)).sum()
}

#[test]
fn what_is_known_to_lie_in_one_piece_is_read_by_the_ring_until_it_does_not() {
    const PART: u64 = 64 * 1024;
    let image = Qcow2Image::create(4 * MIB, &[]);
    let program = Program::start(&image.path(), &["--format", "qcow2"]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    let content = noise(MIB as usize, 19);
    front_end.fill(DATA, &content);
    queue.run_ok(&front_end.memory, &Req::write(0, DATA, MIB as u32));
    let out = DATA + 8 * MIB;
    let expect = |front_end: &FrontEnd, queue: &mut crate::driver::Queue, sector: u64, expected: &[u8]| {
        queue.run_ok(&front_end.memory, &Req::read(sector, out, expected.len() as u32));
        assert!(front_end.bytes(out, expected.len()) == *expected, "sector {sector}");
    };
    expect(&front_end, &mut queue, 0, &content[..4096]);
    let before = driver_switches(&program);
    for sector in 0..64 {
        expect(&front_end, &mut queue, sector * 8, &content[sector as usize * 4096..][..8192]);
    }
    // The threads that have written may not have been asleep before.
    assert!(driver_switches(&program) - before <= 8, "64 reads, and each by a thread of the format's driver");

    // Zeroes, with and without giving the cluster back, and what is written over them.
    for (part, unmap) in [(0u64, 0u32), (1, 1)] {
        let range = [&(part * 128).to_le_bytes()[..], &128u32.to_le_bytes(), &unmap.to_le_bytes()].concat();
        front_end.fill(DATA + 4 * MIB, &range);
        queue.run_ok(&front_end.memory, &Req::ranges(13, DATA + 4 * MIB, 16));
        expect(&front_end, &mut queue, part * 128, &vec![0; PART as usize]);
        queue.run_ok(&front_end.memory, &Req::write(part * 128, DATA, PART as u32));
        expect(&front_end, &mut queue, part * 128, &content[..PART as usize]);
    }

    // While the ring is stopped, another program puts the third part elsewhere, and something else in its place.
    expect(&front_end, &mut queue, 256, &content[2 * PART as usize..][..4096]);
    queue.stop(&front_end);
    let path = image.path();
    for command in ["discard 128k 64k", "write -P 1 2M 64k", "write -P 77 128k 64k"] {
        assert!(
            tool("qemu-io", &["-f", "qcow2", "-d", "unmap", "-c", command, path.to_str().unwrap()]).status.success()
        );
    }
    let base = queue.used_index(&front_end.memory);
    queue.start(&mut front_end, base);
    expect(&front_end, &mut queue, 256, &[77; PART as usize]);
    assert_eq!(program.counter("io_errors"), 0);
}

/// A write to one part of a large cluster gives its neighbours another place, too.
#[test]
fn a_part_whose_cluster_was_written_to_is_not_read_from_where_it_lay_before() {
    const PART: u64 = 64 * 1024;
    let base = ImageFile::new(4 * MIB);
    let content = noise(4 * MIB as usize, 23);
    std::fs::write(base.path(), &content).unwrap();
    let raw = format!("raw:{}", base.path().display());
    let image =
        Qcow2Image::create(4 * MIB, &["-o", "cluster_size=2M", "-F", "raw", "-b", base.path().to_str().unwrap()]);
    let program = Program::start(&image.path(), &["--format", "qcow2", "--backing", &raw]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    let out = DATA + 8 * MIB;
    let expect = |front_end: &FrontEnd, queue: &mut Queue, sector: u64, expected: &[u8]| {
        queue.run_ok(&front_end.memory, &Req::read(sector, out, expected.len() as u32));
        assert!(front_end.bytes(out, expected.len()) == *expected, "sector {sector}");
    };
    let second_part = &content[PART as usize..][..PART as usize];
    expect(&front_end, &mut queue, 128, second_part);
    front_end.fill(DATA, &noise(PART as usize, 29));
    queue.run_ok(&front_end.memory, &Req::write(0, DATA, PART as u32));
    expect(&front_end, &mut queue, 128, second_part);
    front_end.fill(DATA, &noise(PART as usize, 31));
    queue.run_ok(&front_end.memory, &Req::write(128, DATA, PART as u32));
    expect(&front_end, &mut queue, 128, &noise(PART as usize, 31));
    assert_eq!(program.counter("io_errors"), 0);
}

/// What a kill leaves behind that comes after the L1 entry of a new table and before the table's count.
#[test]
fn an_l2_table_that_was_not_counted_is_not_given_away() {
    let image = Qcow2Image::create(4 * MIB, &[]);
    let content = noise(MIB as usize, 37);
    let write_and_read = |addresses: &[(u64, bool)]| {
        let program = Program::start(&image.path(), &["--format", "qcow2"]);
        let mut front_end = FrontEnd::connect(&program);
        let mut queue = front_end.queue(0, 64);
        front_end.fill(DATA, &content);
        for (sector, is_write) in addresses {
            if *is_write {
                queue.run_ok(&front_end.memory, &Req::write(*sector, DATA, MIB as u32));
            }
            queue.run_ok(&front_end.memory, &Req::read(*sector, DATA + 8 * MIB, MIB as u32));
            assert!(front_end.bytes(DATA + 8 * MIB, MIB as usize) == content, "sector {sector}");
        }
        queue.stop(&front_end);
    };
    write_and_read(&[(0, true)]);
    let file = image.file();
    let number = |offset| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    };
    let l2_table = number(number(40)) & 0x00ff_ffff_ffff_fe00;
    let count = number(number(48)) + l2_table / 65536 * 2;
    let mut before = [0; 2];
    file.read_exact_at(&mut before, count).unwrap();
    assert_eq!(before, [0, 1]);
    file.write_all_at(&[0, 0], count).unwrap();
    write_and_read(&[(2048, true), (0, false), (4096, true), (0, false)]);
    image.check();
}

#[test]
fn discarded_clusters_are_given_back() {
    for (compat, expected) in [("compat=1.1", 0), ("compat=0.10", 2)] {
        let image = Qcow2Image::create(4 * MIB, &["-o", compat]);
        let program = Program::start(&image.path(), &["--format", "qcow2"]);
        let mut front_end = FrontEnd::connect(&program);
        let mut queue = front_end.queue(0, 64);
        front_end.fill(DATA, &[7; 2 * MIB as usize]);
        queue.run_ok(&front_end.memory, &Req { data: vec![(DATA, MIB as u32); 2], ..Req::write(0, 0, 0) });
        // All but the last sector, which keeps its cluster, if the version knows of that.
        front_end.fill(DATA + 4 * MIB, &[0u64.to_le_bytes(), 4095u64.to_le_bytes()].concat());
        assert_eq!(queue.run(&front_end.memory, &Req::ranges(11, DATA + 4 * MIB, 16)).0, expected, "{compat}");
        queue.stop(&front_end);
        image.check();
        let content = image.content();
        assert_eq!(content[2 * MIB as usize - 1], 7);
        if expected == 0 {
            let map = qemu_img(&["map", "-f", "qcow2", "--output=json", image.path().to_str().unwrap()]);
            let map: serde_json::Value = serde_json::from_str(&map).unwrap();
            assert_eq!(
                (map[0]["length"].as_u64(), map[0]["data"].as_bool()),
                (Some(2 * MIB - 65536), Some(false)),
                "{map}"
            );
        }
    }
}

#[test]
fn reference_counts_that_free_the_header_make_requests_fail_and_leave_the_image_alone() {
    let image = Qcow2Image::create(MIB, &[]);
    // The table of reference counts is in the second cluster.
    image.file().write_all_at(&[0; 8], 65536).unwrap();
    let before = std::fs::read(image.path()).unwrap();
    let mut program = Program::start(&image.path(), &["--format", "qcow2"]);
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 64);
    for request in [Req::write(0, DATA, 4096), Req::read(0, DATA, 4096), Req::flush()] {
        assert_eq!(queue.run(&front_end.memory, &request).0, 1, "{request:?}");
    }
    queue.run_ok(&front_end.memory, &Req::get_id(DATA));
    queue.stop(&front_end);
    assert!(program.is_alive() && program.count_lines("qemu-img check") == 1);
    assert!(std::fs::read(image.path()).unwrap() == before);
}

/// Damage anywhere in the tables: every request is answered, and the program goes on.
#[test]
fn a_damaged_image_gives_errors_and_no_failure_of_the_program() {
    const LEN: u64 = 4 * MIB;
    let sound = Qcow2Image::create(LEN, &["-o", "cluster_size=4k"]);
    let path = sound.path().to_str().unwrap().to_owned();
    for offset in [0, 1, 3] {
        let write = format!("write -P 5 {offset}M 256k");
        assert!(tool("qemu-io", &["-f", "qcow2", "-c", &write, &path]).status.success());
    }
    let bytes = std::fs::read(sound.path()).unwrap();
    // Tables are where numbers are: clusters that hold data have nothing but fives.
    let tables: Vec<usize> = (0..bytes.len() / 4096)
        .filter(|cluster| bytes[cluster * 4096..][..4096].iter().any(|byte| *byte != 5))
        .collect();
    // The same damage at each run; `VVU_SEED` gives another.
    let mut random = Random(std::env::var("VVU_SEED").map_or(5, |text| text.parse().unwrap()));
    let mut refused = 0;
    for _ in 0..60 {
        let mut damaged = bytes.clone();
        for _ in 0..=random.below(6) {
            let cluster = tables[random.below(tables.len() as u64) as usize];
            // Where there is something, mostly.
            let used: Vec<usize> = (0..4096).filter(|byte| bytes[cluster * 4096 + byte] != 0).collect();
            let place = match random.below(4) {
                0 => random.below(4096) as usize,
                _ => used.get(random.below(used.len().max(1) as u64) as usize).copied().unwrap_or(0),
            };
            damaged[cluster * 4096 + place] = random.below(256) as u8;
        }
        let image = Qcow2Image { directory: disk_directory() };
        std::fs::write(image.path(), &damaged).unwrap();
        refused += u32::from(!survives(&image));
    }
    assert!(refused < 40, "{refused} of 60 images were refused at once: that proves little");
}

/// True if the image was served at all.
fn survives(image: &Qcow2Image) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vvu-blk"));
    let (socket, path) = (directory.path().join("socket"), image.path());
    command.arg("--socket-path").arg(&socket).arg("--image").arg(&path).args(["--format", "qcow2"]);
    let mut program = Program::spawn(command, directory);
    if !program.listens() {
        assert_eq!(program.wait().code(), Some(1));
        return false;
    }
    let mut front_end = FrontEnd::connect(&program);
    let mut queue = front_end.queue(0, 256);
    for index in 0..16 {
        let sector = u64::from(index) * 512;
        let request = match index % 4 {
            0 | 1 => Req::write(sector, DATA + u64::from(index) * MIB, 65536),
            2 => Req::read(sector, DATA + u64::from(index) * MIB, 65536),
            _ => Req::flush(),
        };
        queue.offer_request(&front_end.memory, index * 4, &request);
    }
    queue.publish(&front_end.memory);
    queue.kick();
    for _ in 0..16 {
        queue.wait_used(&front_end.memory);
    }
    queue.stop(&front_end);
    assert!(program.is_alive());
    true
}
