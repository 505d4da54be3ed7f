//! What changes the system, in namespaces of its own: each test starts this binary anew by `unshare`, for one of the parts below
//! that are ignored otherwise. Without root, a user namespace gives the rights.

#![expect(unsafe_code, reason = "a TAP is opened by an ioctl, as the back-end does")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::ioctl::{Setter, ioctl};
use vvu_agent::network::{NetworkError, TAP, make_uplink};
use vvu_agent::process_table::{kill_user, of_user};
use vvu_agent::user::User;

const LIMIT: Duration = Duration::from_secs(30);

/// IFF_TAP, IFF_NO_PI; IFF_MULTI_QUEUE; IFF_VNET_HDR (`linux/if_tun.h`).
const PLAIN_TAP: i16 = 0x1002;
const MULTI_QUEUE: i16 = 0x0100;
const NET_HEADER: i16 = 0x4000;

/// Runs an ignored test of this file in new namespaces.
fn isolated(part: &str, namespaces: &[&str]) {
    let mut command = Command::new("unshare");
    if !rustix::process::getuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(namespaces).arg(std::env::current_exe().unwrap());
    command.args(["--exact", part, "--ignored", "--nocapture", "--test-threads=1"]);
    let output = command.output().expect("unshare of util-linux is needed");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
}

#[test]
fn frames_pass_the_uplink_and_nothing_answers() {
    isolated("isolated::uplink", &["--net", "--mount"]);
}

#[test]
fn what_a_program_leaves_behind_is_ended() {
    isolated("isolated::leftovers", &["--pid", "--fork", "--mount-proc"]);
}

#[test]
fn a_program_is_root_over_its_own_files_only() {
    isolated("isolated::root_of_a_namespace", &["--pid", "--fork", "--mount-proc"]);
}

#[repr(C)]
struct Interface {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

fn tap(name: &str, flags: i16) -> File {
    const SET_INTERFACE: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<i32>(b'T', 202);
    let device = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut interface = Interface { name: [0; 16], flags, rest: [0; 22] };
    interface.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF takes a `struct ifreq`, whose size and beginning this one has.
    unsafe { ioctl(&device, Setter::<SET_INTERFACE, _>::new(interface)) }.unwrap();
    device
}

fn attribute(path: &str) -> String {
    fs::read_to_string(Path::new("/sys/class/net").join(path)).unwrap().trim().to_owned()
}

/// A frame for experiments (IEEE 802, EtherType 0x88b5), from one MAC address to another.
fn frame(to: u8, from: u8, filling: u8) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 0x88, 0xb5];
    frame.resize(1000, filling);
    frame
}

/// The next packet that comes from a TAP within a moment.
fn next(tap: &mut File, moment: Timespec) -> Option<Vec<u8>> {
    let mut ready = [PollFd::new(tap, PollFlags::IN)];
    if poll(&mut ready, Some(&moment)).unwrap() == 0 {
        return None;
    }
    let mut packet = vec![0; 70_000];
    let len = tap.read(&mut packet).unwrap();
    packet.truncate(len);
    Some(packet)
}

const MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// Sends until the frame comes out at the other end: a link that comes up may lose some.
fn passes(from: &mut File, packet: &[u8], to: &mut File, expected: &[u8]) {
    let started = Instant::now();
    while started.elapsed() < LIMIT {
        from.write_all(packet).unwrap();
        if next(to, MOMENT).is_some_and(|packet| packet == expected) {
            return;
        }
    }
    panic!("the frame does not come through");
}

#[test]
#[ignore = "needs namespaces of its own"]
fn uplink() {
    // The interfaces of this namespace are those of a new mount only.
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("sysfs", "/sys", "sysfs", flags, None).unwrap();
    // A TAP stands for the card: what is written to it comes from outside.
    let mut outside = tap("card", PLAIN_TAP);
    let mac = attribute("card/address");
    let missing = make_uplink("52:54:00:ff:ff:ff", 9000, 0).unwrap_err();
    assert!(matches!(&missing, NetworkError::NoCard { mac } if mac == "52:54:00:ff:ff:ff"), "{missing}");
    // In a user namespace there is no other user.
    let owner = if attribute_of_process("uid_map").contains("4294967295") { 1234 } else { 0 };
    make_uplink(&mac, 9000, owner).unwrap();

    assert_eq!(attribute("vvu0/owner"), owner.to_string());
    // With IFF_PERSIST.
    let tap_flags = i64::from(PLAIN_TAP | MULTI_QUEUE | NET_HEADER | 0x0800);
    assert_eq!(attribute("vvu0/tun_flags"), format!("{tap_flags:#x}"));
    for interface in ["card", "vvu0", "vvubr0"] {
        assert_eq!(attribute(&format!("{interface}/mtu")), "9000", "{interface}");
        let up =
            i64::from_str_radix(attribute(&format!("{interface}/flags")).trim_start_matches("0x"), 16).unwrap() & 1;
        assert_eq!(up, 1, "{interface}");
    }
    assert_eq!(attribute("vvubr0/bridge/stp_state"), "0");
    assert_eq!(attribute("vvubr0/bridge/multicast_snooping"), "0");

    // Two queues, as a back-end may open.
    let mut back_end = tap(TAP, PLAIN_TAP | MULTI_QUEUE | NET_HEADER);
    let _second_queue = tap(TAP, PLAIN_TAP | MULTI_QUEUE | NET_HEADER);
    let out = frame(0xff, 1, b'o');
    let with_header = |frame: &[u8]| [&[0; 10], frame].concat();
    passes(&mut back_end, &with_header(&out), &mut outside, &out);
    let mut large = frame(1, 2, b'l');
    large.resize(9014, b'l');
    passes(&mut outside, &large, &mut back_end, &with_header(&large));
    nothing_speaks(&mut outside, &mut back_end);
}

/// No interface has an address, and none says anything by itself or when it is asked.
fn nothing_speaks(outside: &mut File, back_end: &mut File) {
    assert_eq!(attribute_of_process("net/if_inet6"), "");
    while next(outside, MOMENT).is_some() || next(back_end, MOMENT).is_some() {}
    // ARP: who has 0.0.0.0, and who has 127.0.0.1, asked by 10.0.0.2 (RFC 826).
    for asked in [[0, 0, 0, 0], [127, 0, 0, 1]] {
        let mut question = vec![0xff; 6];
        question.extend([2, 0, 0, 0, 0, 2, 0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 2, 10, 0, 0, 2]);
        question.extend([0; 6]);
        question.extend(asked);
        outside.write_all(&question).unwrap();
    }
    // Long enough for what an interface says after it has come up (RFC 4862: within 1 s).
    let second = Timespec { tv_sec: 1, tv_nsec: 500_000_000 };
    let said = next(outside, second);
    assert_eq!(said, None);
}

fn attribute_of_process(name: &str) -> String {
    fs::read_to_string(Path::new("/proc/self").join(name)).unwrap()
}

#[test]
#[ignore = "needs namespaces of its own"]
fn leftovers() {
    assert!(rustix::process::getpid().is_init(), "the kernel protects PID 1 of a namespace from its own signals only");
    let user = User::Plain { id: rustix::process::getuid().as_raw() };
    let mut program: Child =
        Command::new("sh").args(["-c", "sleep 1000 & (setsid sleep 1000 &) ; exit 0"]).spawn().unwrap();
    program.wait().unwrap();
    let others = || of_user(user).unwrap().into_iter().filter(|pid| *pid != 1).count();
    let until = |count: usize| {
        let started = Instant::now();
        while others() != count {
            assert!(started.elapsed() < LIMIT, "{} processes", others());
            std::thread::yield_now();
        }
    };
    until(2);
    assert!(kill_user(user).unwrap());
    until(0);
}

/// What a program in a namespace of its own tries. What it must not be able to do says nothing if it fails.
const TRIES: &str = "
    echo is $(id -u):$(id -g) $(id -G), maps $(cat /proc/self/uid_map), maps $(cat /proc/self/gid_map)
    chown 7:65535 own && setpriv --reuid=7 --clear-groups stat -c 'gives %u:%g' own
    mkfifo fifo && mknod null c 1 3 && echo makes devices
    cat secret && echo reads secrets
    chown 0:0 secret && echo takes files
    kill -0 1 && echo signals others
    unshare --user true && echo makes namespaces
    unshare --mount true && echo mounts
    unshare --net true && echo has networks
    echo 9 > /proc/sys/user/max_user_namespaces && echo lifts limits
    grep -e CapEff -e CapPrm -e CapBnd /proc/self/status
";

#[test]
#[ignore = "needs namespaces of its own"]
fn root_of_a_namespace() {
    const FIRST: u32 = 100_000;
    let directory = tempfile::tempdir().unwrap();
    let user = User::NamespaceRoot { first: FIRST, count: 1 << 16 };
    let mut command = Command::new("sh");
    command.args(["-c", TRIES]).current_dir(directory.path());
    user.apply(&mut command).unwrap();
    if attribute_of_process("uid_map").split_ascii_whitespace().nth(2) != Some("4294967295") {
        // Nobody may give it ids that the giver does not have; then it does not begin at all.
        let refused = command.spawn().unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied, "{refused}");
        return;
    }
    rustix::thread::set_no_new_privs(true).unwrap();
    for name in ["own", "secret"] {
        fs::write(directory.path().join(name), "it\n").unwrap();
        fs::set_permissions(directory.path().join(name), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }
    for path in [directory.path().to_owned(), directory.path().join("own")] {
        std::os::unix::fs::chown(path, Some(FIRST), Some(FIRST)).unwrap();
    }
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap().split_ascii_whitespace().collect::<Vec<_>>().join(" ");
    let ids = format!("is 0:0 0, maps 0 {FIRST} 65536, maps 0 {FIRST} 65536");
    let rights = "CapPrm: 00000000880401ff CapEff: 00000000880401ff CapBnd: 00000000880401ff";
    assert_eq!(said, format!("{ids} gives 7:65535 {rights}"), "{}", String::from_utf8_lossy(&output.stderr));
}
