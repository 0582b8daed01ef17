//! What an export of NFS is told.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use super::groups::Groups;
use super::records::ClientRecords;
use super::rpc::Caller;
use crate::vfs::Credentials;

/// Who may mount, and as whom they act.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Networks whose hosts may connect; all, if none is named.
    pub clients: Vec<Network>,
    /// User and group 0 of a client become the anonymous ones.
    pub root_squash: bool,
    /// So do all users and groups.
    pub all_squash: bool,
    /// Nothing can be changed through this export.
    pub read_only: bool,
    /// The anonymous user.
    pub anonymous_uid: u32,
    /// The anonymous group.
    pub anonymous_gid: u32,
    /// Where the further groups of users are looked up. Without, they are those that the client says, which are at most 16.
    pub groups: Option<Arc<Groups>>,
}

impl Default for ExportOptions {
    fn default() -> ExportOptions {
        ExportOptions {
            clients: Vec::new(),
            root_squash: true,
            all_squash: false,
            read_only: false,
            anonymous_uid: 65_534,
            anonymous_gid: 65_534,
            groups: None,
        }
    }
}

impl ExportOptions {
    /// Whether a host may use the export.
    pub fn allows(&self, host: IpAddr) -> bool {
        self.clients.is_empty() || self.clients.iter().any(|network| network.contains(host))
    }

    /// Whom a caller's operations are checked against.
    pub fn credentials(&self, caller: &Caller) -> Credentials {
        match caller {
            Caller::Unix { uid, gid, groups } if !self.all_squash => {
                let group = |gid: &u32| if self.root_squash && *gid == 0 { self.anonymous_gid } else { *gid };
                let squashed = self.root_squash && *uid == 0;
                let groups = match &self.groups {
                    Some(_) if squashed => Vec::new(),
                    Some(known) => known.of(*uid).iter().map(group).collect(),
                    None => groups.iter().map(group).collect(),
                };
                Credentials { uid: if squashed { self.anonymous_uid } else { *uid }, gid: group(gid), groups }
            }
            _ => Credentials { uid: self.anonymous_uid, gid: self.anonymous_gid, groups: Vec::new() },
        }
    }
}

/// A network: an address and how many of its bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    bits: u8,
}

impl Network {
    /// Whether a host is in it. IPv4 addresses inside IPv6 count as what they are.
    pub fn contains(&self, host: IpAddr) -> bool {
        let wide = |address: IpAddr| match address.to_canonical() {
            IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, true),
            IpAddr::V6(v6) => (u128::from(v6), false),
        };
        let ((mine, mine_4), (theirs, theirs_4)) = (wide(self.address), wide(host));
        mine_4 == theirs_4 && (mine ^ theirs).checked_shr(128 - u32::from(self.bits)).unwrap_or(0) == 0
    }
}

impl FromStr for Network {
    type Err = String;

    /// `10.0.0.0/8`, `fd00::/8`, or one address.
    fn from_str(text: &str) -> Result<Network, String> {
        let wrong = || format!("{text:?} is no network; one looks like 10.0.0.0/8 or fd00::/8");
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u8>().map_err(|_| wrong())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(all);
        if bits > all { Err(wrong()) } else { Ok(Network { address, bits }) }
    }
}

/// How a server of NFSv4 runs.
#[derive(Clone)]
pub struct NfsOptions {
    /// Who may do what.
    pub export: ExportOptions,
    /// How long a client that says nothing keeps its opens and locks for sure.
    pub lease: Duration,
    /// How long after a start only what was held before can be opened and locked.
    pub grace: Duration,
    /// Who held something before.
    pub records: Arc<dyn ClientRecords>,
    /// Most bytes of a READ or WRITE; 4 KiB to 4 MiB.
    pub transfer_max: u32,
    /// Requests of one session at a time.
    pub slots: u32,
    /// Whether version 3 and its mount protocol are served on the same port.
    pub version_3: bool,
    /// Whether clients are told that open files outlive their names, also over a restart of the server, so that they need
    /// not rename what they remove.
    pub preserve_unlinked: bool,
}

impl NfsOptions {
    /// The usual, with these records.
    pub fn new(records: Arc<dyn ClientRecords>) -> NfsOptions {
        NfsOptions {
            export: ExportOptions::default(),
            lease: Duration::from_secs(90),
            grace: Duration::from_secs(90),
            records,
            transfer_max: 1 << 20,
            slots: 64,
            version_3: true,
            preserve_unlinked: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_hosts() {
        let within = |network: &str, host: &str| network.parse::<Network>().unwrap().contains(host.parse().unwrap());
        assert!(within("10.0.0.0/8", "10.1.2.3"));
        assert!(!within("10.0.0.0/8", "11.1.2.3"));
        assert!(within("10.0.0.0/8", "::ffff:10.1.2.3"));
        assert!(within("0.0.0.0/0", "1.2.3.4"));
        assert!(!within("0.0.0.0/0", "fd00::1"));
        assert!(within("::/0", "fd00::1"));
        assert!(within("127.0.0.1", "127.0.0.1"));
        assert!(!within("127.0.0.1", "127.0.0.2"));
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "x/8", "1.2.3.4/-1"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }

    #[test]
    fn root_is_squashed() {
        let mut export = ExportOptions::default();
        let root = Caller::Unix { uid: 0, gid: 0, groups: vec![0, 5] };
        let squashed = export.credentials(&root);
        assert_eq!((squashed.uid, squashed.gid, squashed.groups), (65_534, 65_534, vec![65_534, 5]));
        export.root_squash = false;
        assert_eq!(export.credentials(&root).uid, 0);
        export.all_squash = true;
        assert_eq!(export.credentials(&Caller::Unix { uid: 7, gid: 7, groups: vec![7] }).uid, 65_534);
        assert_eq!(export.credentials(&Caller::Nobody).uid, 65_534);
    }

    #[test]
    fn groups_are_looked_up() {
        let groups = Groups::new(|uid| Ok((uid == 7).then(|| (0..40).collect())));
        let export = ExportOptions { groups: Some(Arc::new(groups)), ..ExportOptions::default() };
        let of = |uid| export.credentials(&Caller::Unix { uid, gid: 3, groups: vec![99] }).groups;
        assert_eq!((of(7).len(), of(7)[0], of(7)[39]), (40, 65_534, 39));
        // Neither for those that this host does not know, nor for root that is nobody, does the client's word count.
        assert_eq!((of(8), of(0)), (vec![], vec![]));
    }
}
