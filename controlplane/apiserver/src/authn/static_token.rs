//! The static token file: one `token,user,uid,"group1,group2"` per line, read at start.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::request_info::UserInfo;

/// Tokens by their digest, so that comparing takes the same time whatever was guessed.
#[derive(Default)]
pub struct StaticTokens(std::collections::HashMap<[u8; 32], UserInfo>);

impl StaticTokens {
    /// Reads the file.
    ///
    /// # Errors
    /// A message that names file and line.
    pub fn read(path: &Path) -> Result<StaticTokens, String> {
        let text =
            std::fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        StaticTokens::parse(&text).map_err(|(line, e)| format!("{}:{line}: {e}", path.display()))
    }

    fn parse(text: &str) -> Result<StaticTokens, (usize, String)> {
        let mut tokens = StaticTokens::default();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let mut fields = line.splitn(4, ',').map(str::trim);
            let (Some(token), Some(name), Some(uid)) = (fields.next(), fields.next(), fields.next()) else {
                return Err((i + 1, "must have at least 3 columns: token, user name, user uid".to_owned()));
            };
            if token.is_empty() || name.is_empty() {
                return Err((i + 1, "token and user name must not be empty".to_owned()));
            }
            let groups = fields.next().unwrap_or_default().trim_matches('"');
            let groups =
                groups.split(',').map(str::trim).filter(|g| !g.is_empty()).map(str::to_owned).collect();
            let user = UserInfo { name: name.into(), uid: uid.into(), groups, ..UserInfo::default() };
            tokens.0.insert(Sha256::digest(token).into(), user);
        }
        Ok(tokens)
    }

    /// The token's user.
    pub fn find(&self, token: &str) -> Option<UserInfo> {
        if self.0.is_empty() {
            return None;
        }
        self.0.get(&<[u8; 32]>::from(Sha256::digest(token))).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let t = StaticTokens::parse("# c\n\nabc,jane,u1,\"dev, ops\"\nx,bob,u2\n").map_err(|e| e.1).unwrap();
        assert_eq!(t.find("abc").unwrap().groups, ["dev", "ops"]);
        assert_eq!(t.find("x").unwrap().name, "bob");
        assert!(t.find("abcd").is_none());
        assert_eq!(StaticTokens::parse("a,b\n").err().unwrap().0, 1);
    }
}
