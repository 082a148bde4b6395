//! Gets kernel images from distributions' archives through apt, with its own lists: the machine's sources stay as they
//! are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::step;

/// The keyring comes with a package that set-up installs.
const DEBIAN: &str = "\
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bullseye main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian-security bullseye-security main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie-backports main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian sid main
";
/// Ubuntu's keys, as Debian packages them.
const UBUNTU_KEYRING: &str = "ubuntu-keyring";

pub struct Archive {
    folder: PathBuf,
}

impl Archive {
    pub fn prepare(folder: &Path) -> Result<Self> {
        for inner in ["lists/partial", "cache/archives/partial", "images"] {
            fs::create_dir_all(folder.join(inner))?;
        }
        fs::write(folder.join("status"), "")?;
        let at = |inner: &str| folder.join(inner).display().to_string();
        fs::write(
            folder.join("apt.conf"),
            format!(
                "Dir::State::Lists \"{}\";\nDir::Cache \"{}\";\nDir::Etc::SourceList \"{}\";\n\
                 Dir::Etc::SourceParts \"/dev/null\";\nDir::State::status \"{}\";\nAcquire::Languages \"none\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\nAPT::Sandbox::User \"root\";\n",
                at("lists"),
                at("cache"),
                at("sources.list"),
                at("status"),
            ),
        )?;
        let archive = Self { folder: folder.to_owned() };
        archive.read_lists("Debian", DEBIAN)?;
        match archive.ubuntu() {
            Ok(ubuntu) => archive.read_lists("Debian and Ubuntu", &format!("{DEBIAN}{ubuntu}"))?,
            Err(error) => eprintln!("  no kernels of Ubuntu's: {error:#}"),
        }
        Ok(archive)
    }

    /// An archive that does not answer matters only if a kernel then can't be found.
    fn read_lists(&self, whose: &str, sources: &str) -> Result<()> {
        fs::write(self.folder.join("sources.list"), sources)?;
        let mut update = self.tool("apt-get");
        let updated = step::run(
            &format!("reading the package lists of {whose}"),
            update.arg("update"),
            &self.folder.join("update.log"),
        );
        if let Err(error) = updated {
            eprintln!("  {error:#}; going on");
        }
        Ok(())
    }

    /// Its sources, with its keys got through Debian.
    fn ubuntu(&self) -> Result<String> {
        let keys = self.folder.join("keys");
        let keyring = keys.join("usr/share/keyrings/ubuntu-archive-keyring.gpg");
        if !keyring.exists() {
            self.unpack(UBUNTU_KEYRING, &keys)?;
        }
        ensure!(keyring.exists(), "{UBUNTU_KEYRING} holds no keyring");
        let source = |suite: &str| {
            format!("deb [signed-by={}] http://archive.ubuntu.com/ubuntu {suite} main\n", keyring.display())
        };
        Ok(source("jammy") + &source("jammy-updates"))
    }

    /// The image of the newest package whose name fits the pattern.
    pub fn image(&self, pattern: &str) -> Result<PathBuf> {
        let found =
            self.tool("apt-cache").args(["search", "--names-only", pattern]).output().context("run apt-cache")?;
        let found = String::from_utf8_lossy(&found.stdout).into_owned();
        let names = found.lines().filter_map(|line| line.split(' ').next());
        let newest = names
            .max_by_key(|name| numbers(name))
            .with_context(|| format!("no package fits {pattern}: see {}", self.folder.join("update.log").display()))?;
        let unpacked = self.folder.join("images").join(newest);
        if let Some(image) = find_image(&unpacked) {
            return Ok(image);
        }
        self.unpack(newest, &unpacked)?;
        if find_image(&unpacked).is_none() {
            // From Linux 7.3 on Debian keeps the image in a package of its own.
            self.unpack(&newest.replacen("linux-image-", "linux-binary-", 1), &unpacked)?;
        }
        find_image(&unpacked).with_context(|| format!("{newest} holds no kernel image"))
    }

    fn unpack(&self, package: &str, to: &Path) -> Result<()> {
        fs::create_dir_all(to)?;
        let mut download = self.tool("apt-get");
        download.args(["download", package]).current_dir(to);
        step::run(&format!("downloading {package}"), &mut download, &self.folder.join("download.log"))?;
        for entry in fs::read_dir(to)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                let status = Command::new("dpkg").arg("-x").args([&path, to]).status().context("run dpkg")?;
                ensure!(status.success(), "{} cannot be unpacked", path.display());
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    fn tool(&self, name: &str) -> Command {
        let mut tool = Command::new(name);
        tool.env("APT_CONFIG", self.folder.join("apt.conf"));
        tool
    }
}

/// `boot/vmlinuz-*`, or since Linux 7.3 `usr/lib/modules/*/vmlinuz`.
fn find_image(unpacked: &Path) -> Option<PathBuf> {
    let children = |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"));
    children(unpacked.join("boot"))
        .find(named)
        .or_else(|| children(unpacked.join("usr/lib/modules")).flat_map(children).find(named))
}

/// All numbers of a name, to compare versions by.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|char: char| !char.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn versions_are_compared_by_number() {
        let newest = ["linux-image-7.3.4+deb13-cloud-amd64", "linux-image-7.12.1+deb14-cloud-amd64"];
        assert_eq!(newest.iter().max_by_key(|name| numbers(name)), Some(&newest[1]));
        let newest = ["linux-image-6.1.0-50-cloud-amd64", "linux-image-6.1.0-9-cloud-amd64"];
        assert_eq!(newest.iter().max_by_key(|name| numbers(name)), Some(&newest[0]));
    }
}
