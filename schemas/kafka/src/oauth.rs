//! Tokens for OAUTHBEARER, from a file that somebody else keeps fresh, such as a projected service account token.

use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rdkafka::client::OAuthToken;
use serde::Deserialize;

/// A token that cannot be used. No message repeats it.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Nobody said where the token is.
    #[error("sasl.mechanism is OAUTHBEARER, and sasl.oauthbearer.config does not say file=PATH")]
    NoFile,
    /// The file cannot be read.
    #[error("the token file {path} cannot be read: {error}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why. Not its `source`, which whoever shows the whole chain would show twice.
        error: std::io::Error,
    },
    /// The file is not a JSON Web Token with the claims that are needed.
    #[error("the token file {path} holds no JSON Web Token with the claims `sub` and `exp`")]
    NoToken {
        /// The file.
        path: PathBuf,
    },
}

/// The claims that matter to a client (RFC 7519, section 4.1).
#[derive(Deserialize)]
struct Claims {
    /// Whose token it is.
    sub: String,
    /// When it expires, in seconds since the epoch; may have a fraction.
    exp: f64,
}

/// The token in the file that `config`, the value of `sasl.oauthbearer.config`, names as `file=PATH`.
///
/// librdkafka asks anew when four fifths of the token's life are over, so the file is read anew each time.
pub fn oauth_token(config: Option<&str>) -> Result<OAuthToken, TokenError> {
    let path = config.and_then(|config| config.trim().strip_prefix("file=")).ok_or(TokenError::NoFile)?;
    let path = PathBuf::from(path);
    let token = match std::fs::read_to_string(&path) {
        Ok(text) => text.trim().to_owned(),
        Err(error) => return Err(TokenError::Unreadable { path, error }),
    };
    let Some(claims) = claims(&token) else { return Err(TokenError::NoToken { path }) };
    Ok(OAuthToken { token, principal_name: claims.sub, lifetime_ms: (claims.exp * 1000.0) as i64 })
}

fn claims(token: &str) -> Option<Claims> {
    let payload = token.split('.').nth(1)?;
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::unwrap_used)]
    fn a_token_says_whose_it_is_and_when_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let config = format!("file={}", file.display());
        let encode = |text: &str| URL_SAFE_NO_PAD.encode(text);
        let token = format!("{}.{}.x", encode("{}"), encode(r#"{"sub":"sluice","exp":1700000000.5}"#));
        std::fs::write(&file, format!("{token}\n")).unwrap();
        let read = oauth_token(Some(&config)).unwrap();
        assert_eq!((read.principal_name.as_str(), read.lifetime_ms), ("sluice", 1_700_000_000_500));
        assert_eq!(read.token, token);
    }

    #[test]
    #[allow(clippy::unwrap_used)]
    fn what_is_no_token_is_refused_without_being_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let config = format!("file={}", file.display());
        assert!(matches!(oauth_token(None), Err(TokenError::NoFile)));
        assert!(matches!(oauth_token(Some("scope=x")), Err(TokenError::NoFile)));
        assert!(matches!(oauth_token(Some(&config)), Err(TokenError::Unreadable { .. })));
        for text in ["", "hunter2", "a.b.c", "a.e30.c"] {
            std::fs::write(&file, text).unwrap();
            let Err(refusal) = oauth_token(Some(&config)) else { panic!("{text:?} is no token") };
            assert!(matches!(refusal, TokenError::NoToken { .. }));
            assert!(!refusal.to_string().contains("hunter"));
        }
    }
}
