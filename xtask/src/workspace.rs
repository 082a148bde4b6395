//! Finds the workspace's root and its target directory.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

#[derive(Clone, Debug)]
pub struct Workspace {
    pub root: PathBuf,
    /// `target/`, or wherever the user's cargo configuration puts it.
    pub target: PathBuf,
}

impl Workspace {
    pub fn locate() -> Result<Self> {
        // Cargo sets the variable for `cargo xtask` and for the CLI's build script: both packages stand in the root.
        let package =
            env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        let root = package.parent().context("this package has no workspace around it")?.to_path_buf();
        let target = target_directory(&root)?;
        Ok(Self { root, target })
    }

    /// Where the tools that set-up builds are installed.
    pub fn tools(&self) -> PathBuf {
        self.target.join("toolchain")
    }
}

/// The cargo that runs us, so that a chosen toolchain stays chosen.
pub fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn target_directory(root: &Path) -> Result<PathBuf> {
    let output = cargo()
        .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
        .current_dir(root)
        .output()
        .context("run `cargo metadata`")?;
    ensure!(output.status.success(), "`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    let metadata = String::from_utf8(output.stdout).context("`cargo metadata` is not UTF-8")?;
    string_field(&metadata, "target_directory").map(PathBuf::from).context("`cargo metadata` names no target directory")
}

/// The last string under `name` in a JSON text: one field does not justify a JSON parser in every build.
fn string_field(json: &str, name: &str) -> Option<String> {
    let key = format!("\"{name}\":\"");
    let mut characters = json[json.rfind(&key)? + key.len()..].chars();
    let mut value = String::new();
    loop {
        match characters.next()? {
            '"' => return Some(value),
            // Paths hold no other escapes than `\\` and `\"`.
            '\\' => value.push(characters.next()?),
            other => value.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::string_field;

    #[test]
    fn a_field_is_found_and_unescaped() {
        let json = r#"{"packages":[{"name":"x"}],"target_directory":"/a \"b\"/c\\d","version":1}"#;
        assert_eq!(string_field(json, "target_directory").as_deref(), Some(r#"/a "b"/c\d"#));
        assert_eq!(string_field(json, "absent"), None);
        assert_eq!(string_field(r#"{"cut":"off"#, "cut"), None);
    }
}
