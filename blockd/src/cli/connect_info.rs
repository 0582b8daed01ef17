//! `blockd connect-info`: what to type on a host to attach a volume or a snapshot over NVMe/TCP.

use std::net::{IpAddr, SocketAddr};

use anyhow::bail;
use clap::Args;
use serde::Serialize;

use super::snapshot::{SnapshotName, parse_snapshot};
use super::{ClientArgs, volume::parse_name};
use crate::admin::api::{DaemonInfo, SnapshotStatus, VolumeInfo};
use crate::program::{print, print_json};

#[derive(Args, Debug)]
pub(super) struct ConnectInfoArgs {
    /// The volume, or one of its snapshots: VOLUME or VOLUME@SNAPSHOT
    #[arg(value_parser = parse_disk, value_name = "VOLUME")]
    disk: DiskName,

    /// Address of this machine as the host reaches it, where the daemon listens on all of them
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Clone, Debug)]
enum DiskName {
    Volume(String),
    Snapshot(SnapshotName),
}

/// For clap: `VOLUME` or `VOLUME@SNAPSHOT`.
fn parse_disk(text: &str) -> Result<DiskName, String> {
    match text.contains('@') {
        true => parse_snapshot(text).map(DiskName::Snapshot),
        false => parse_name(text).map(DiskName::Volume).map_err(|e| e.to_string()),
    }
}

/// What a host attaches.
struct Disk {
    name: String,
    id: String,
    nqn: String,
    read_only: bool,
}

impl Disk {
    fn volume(volume: &VolumeInfo) -> anyhow::Result<Self> {
        if volume.nqn.is_empty() {
            bail!(
                "volume {:?} could not be read, so its NVMe name is not known; see `blockd volume show`",
                volume.name
            );
        }
        Ok(Self { name: volume.name.clone(), id: volume.id.clone(), nqn: volume.nqn.clone(), read_only: false })
    }

    fn snapshot(name: &SnapshotName, of: &[SnapshotStatus]) -> anyhow::Result<Self> {
        let SnapshotName { volume, snapshot } = name;
        let found = of.iter().find(|found| found.name == *snapshot && !found.hidden);
        let Some(found) = found else {
            bail!("volume {volume:?} has no snapshot {snapshot:?}; `blockd snapshot list {volume}` shows those it has");
        };
        Ok(Self { name: format!("{volume}@{snapshot}"), id: found.id.clone(), nqn: found.nqn.clone(), read_only: true })
    }
}

/// The lines, as JSON has them.
#[derive(Debug, PartialEq, Serialize)]
struct Lines {
    nqn: String,
    discover: Vec<String>,
    connect: Vec<String>,
    disconnect: String,
    device: String,
    discovery_conf: Vec<String>,
    fstab: String,
}

pub(super) async fn run(args: ConnectInfoArgs) -> anyhow::Result<()> {
    let client = args.client.client();
    let daemon = client.info().await?;
    let disk = match &args.disk {
        DiskName::Volume(name) => Disk::volume(&client.volume(name).await?.info)?,
        DiskName::Snapshot(name) => Disk::snapshot(name, &client.snapshots(Some(&name.volume)).await?)?,
    };
    let lines = lines(&daemon, &disk, args.address)?;
    if args.client.json { print_json(&lines) } else { print(&text(&lines, &disk)) }
}

fn lines(daemon: &DaemonInfo, disk: &Disk, address: Option<IpAddr>) -> anyhow::Result<Lines> {
    if daemon.nvme.is_empty() {
        bail!("the daemon does not speak NVMe/TCP; start it with --nvme ADDR, for instance --nvme 0.0.0.0:4420");
    }
    let mut places = Vec::new();
    for listen in &daemon.nvme {
        let place = match (listen.ip().is_unspecified(), address) {
            (false, _) => *listen,
            (true, Some(address)) => SocketAddr::new(address, listen.port()),
            (true, None) => bail!(
                "the daemon listens for NVMe/TCP hosts on all addresses ({listen}); say with --address which one the \
                 host reaches"
            ),
        };
        places.push(place);
    }
    let at = |place: &SocketAddr| format!("-t tcp -a {} -s {}", place.ip(), place.port());
    let (device, nqn) = (format!("/dev/disk/by-id/nvme-uuid.{}", hyphenated(&disk.id)), &disk.nqn);
    // The journal of a file system that was mounted when the snapshot was made cannot be replayed on a disk that is not
    // written; it must have been frozen.
    let how = if disk.read_only { "_netdev,nofail,ro,noload 0 0" } else { "_netdev,nofail,discard 0 2" };
    Ok(Lines {
        nqn: nqn.clone(),
        discover: places.iter().map(|place| format!("nvme discover {}", at(place))).collect(),
        connect: places
            .iter()
            .map(|place| format!("nvme connect {} -n {nqn} --ctrl-loss-tmo=-1 --reconnect-delay=2", at(place)))
            .collect(),
        disconnect: format!("nvme disconnect -n {nqn}"),
        discovery_conf: places
            .iter()
            .map(|place| format!("{} --ctrl-loss-tmo=-1 --reconnect-delay=2", at(place)))
            .collect(),
        fstab: format!("{device} /mnt/{} ext4 {how}", disk.name),
        device,
    })
}

/// An identity as Linux writes UUIDs.
fn hyphenated(id: &str) -> String {
    uuid::Uuid::parse_str(id).map_or_else(|_| id.to_owned(), |id| id.hyphenated().to_string())
}

fn text(lines: &Lines, disk: &Disk) -> String {
    let name = &disk.name;
    let mut text = String::new();
    let mut section = |title: &str, lines: &[String]| {
        text += &format!("# {title}\n");
        for line in lines {
            text += line;
            text.push('\n');
        }
        text.push('\n');
    };
    section("On the host, once (Debian: apt install nvme-cli)", &["modprobe nvme-tcp".to_owned()]);
    section("What is there", &lines.discover);
    section("Attach it; several lines are several paths to the same disk", &lines.connect);
    section("The disk", std::slice::from_ref(&lines.device));
    section("Take it away", std::slice::from_ref(&lines.disconnect));
    section(
        "At every start: these lines in /etc/nvme/discovery.conf, and systemctl enable nvmf-autoconnect.service",
        &lines.discovery_conf,
    );
    section(
        &match disk.read_only {
            true => format!(
                "Mount it: this line in /etc/fstab (xfs: norecovery,nouuid for noload), after mkdir /mnt/{name}"
            ),
            false => format!("Mount it: this line in /etc/fstab, after mkfs.ext4 on the disk and mkdir /mnt/{name}"),
        },
        std::slice::from_ref(&lines.fstab),
    );
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn daemon(listens: &[&str]) -> DaemonInfo {
        DaemonInfo { nvme: listens.iter().map(|listen| listen.parse().unwrap()).collect(), ..Default::default() }
    }

    fn volume() -> Disk {
        Disk::volume(&VolumeInfo {
            name: "disk".into(),
            id: "0123456789abcdef0123456789abcdef".into(),
            nqn: "nqn.x".into(),
            ..Default::default()
        })
        .unwrap()
    }

    #[test]
    fn every_address_is_a_path() {
        let found = lines(&daemon(&["10.0.0.5:4420", "[::1]:4421"]), &volume(), None).unwrap();
        assert_eq!(
            found.connect[0],
            "nvme connect -t tcp -a 10.0.0.5 -s 4420 -n nqn.x --ctrl-loss-tmo=-1 --reconnect-delay=2"
        );
        assert_eq!(found.discover[1], "nvme discover -t tcp -a ::1 -s 4421");
        assert_eq!(found.device, "/dev/disk/by-id/nvme-uuid.01234567-89ab-cdef-0123-456789abcdef");
        let text = text(&found, &volume());
        assert!(text.contains("/etc/fstab") && text.ends_with(" 0 2\n"), "{text}");
    }

    #[test]
    fn a_snapshot_is_mounted_read_only() {
        let status = SnapshotStatus { name: "s".into(), id: "00".into(), nqn: "nqn.s".into(), ..Default::default() };
        let name = |snapshot: &str| SnapshotName { volume: "disk".into(), snapshot: snapshot.into() };
        let disk = Disk::snapshot(&name("s"), std::slice::from_ref(&status)).unwrap();
        let found = lines(&daemon(&["10.0.0.5:4420"]), &disk, None).unwrap();
        assert!(found.connect[0].contains("-n nqn.s ") && found.fstab.contains(" /mnt/disk@s ext4 _netdev,nofail,ro,"));
        let hidden = SnapshotStatus { hidden: true, ..status };
        assert!(Disk::snapshot(&name("s"), &[hidden]).is_err());
    }

    #[test]
    fn a_wildcard_needs_an_address() {
        let all = daemon(&["0.0.0.0:4420"]);
        assert!(lines(&all, &volume(), None).unwrap_err().to_string().contains("--address"));
        let found = lines(&all, &volume(), Some("10.0.0.7".parse().unwrap())).unwrap();
        assert!(found.discover[0].contains("-a 10.0.0.7 -s 4420"));
        assert!(lines(&daemon(&[]), &volume(), None).unwrap_err().to_string().contains("--nvme"));
    }
}
