//! `blockd connect-info`: what to type on a host to attach a volume over NVMe/TCP.

use std::net::{IpAddr, SocketAddr};

use anyhow::bail;
use clap::Args;
use serde::Serialize;

use super::{ClientArgs, print, print_json, volume::parse_name};
use crate::admin::api::DaemonInfo;
use crate::admin::api::VolumeInfo;

#[derive(Args, Debug)]
pub(super) struct ConnectInfoArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// Address of this machine as the host reaches it, where the daemon listens on all of them
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,

    #[command(flatten)]
    client: ClientArgs,
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
    let (daemon, volume) = (client.info().await?, client.volume(&args.name).await?);
    let lines = lines(&daemon, &volume.info, args.address)?;
    if args.client.json { print_json(&lines) } else { print(&text(&lines, &volume.info.name)) }
}

fn lines(daemon: &DaemonInfo, volume: &VolumeInfo, address: Option<IpAddr>) -> anyhow::Result<Lines> {
    if daemon.nvme.is_empty() {
        bail!("the daemon does not speak NVMe/TCP; start it with --nvme ADDR, for instance --nvme 0.0.0.0:4420");
    }
    if volume.nqn.is_empty() {
        bail!("volume {:?} could not be read, so its NVMe name is not known; see `blockd volume show`", volume.name);
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
    let device = format!("/dev/disk/by-id/nvme-uuid.{}", hyphenated(&volume.id));
    Ok(Lines {
        nqn: volume.nqn.clone(),
        discover: places.iter().map(|place| format!("nvme discover {}", at(place))).collect(),
        connect: places
            .iter()
            .map(|place| format!("nvme connect {} -n {} --ctrl-loss-tmo=-1 --reconnect-delay=2", at(place), volume.nqn))
            .collect(),
        disconnect: format!("nvme disconnect -n {}", volume.nqn),
        discovery_conf: places
            .iter()
            .map(|place| format!("{} --ctrl-loss-tmo=-1 --reconnect-delay=2", at(place)))
            .collect(),
        fstab: format!("{device} /mnt/{} ext4 _netdev,nofail,discard 0 2", volume.name),
        device,
    })
}

/// An identity as Linux writes UUIDs.
fn hyphenated(id: &str) -> String {
    uuid::Uuid::parse_str(id).map_or_else(|_| id.to_owned(), |id| id.hyphenated().to_string())
}

fn text(lines: &Lines, name: &str) -> String {
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
        &format!("Mount it: this line in /etc/fstab, after mkfs.ext4 on the disk and mkdir /mnt/{name}"),
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

    fn volume() -> VolumeInfo {
        VolumeInfo {
            name: "disk".into(),
            id: "0123456789abcdef0123456789abcdef".into(),
            nqn: "nqn.x".into(),
            ..Default::default()
        }
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
        let text = text(&found, "disk");
        assert!(text.contains("/etc/fstab") && text.ends_with(" 0 2\n"), "{text}");
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
