//! What the SDK's errors mean.

use std::error::Error;

use anyhow::anyhow;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use super::super::{StoreError, StoreErrorKind};

/// The store's error for a failed request.
pub(super) fn from_sdk<E>(op: &'static str, key: &str, error: SdkError<E, HttpResponse>) -> StoreError
where
    E: Error + ProvideErrorMetadata + Send + Sync + 'static,
{
    let SdkError::ServiceError(service) = &error else {
        let kind = kind_of_failure(&error);
        let hint = if kind == StoreErrorKind::Denied {
            "no usable credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an instance role: "
        } else {
            ""
        };
        return StoreError::new(kind, op, key, anyhow!("{hint}{}", in_words(&error)));
    };
    let status = service.raw().status().as_u16();
    let code = service.err().code().unwrap_or_default();
    let message = match service.err().message() {
        Some(message) => message.to_owned(),
        // No error as the protocol has it; what the SDK made of it is all there is.
        None if code.is_empty() => in_words(service.err()),
        None => String::new(),
    };
    let id = service.raw().headers().get("x-amz-request-id").unwrap_or("none");
    let (kind, hint) = kind_of_answer(status, code);
    let gap = if hint.is_empty() { "" } else { "; " };
    StoreError::new(kind, op, key, anyhow!("HTTP {status} {code} {message} (request {id}){gap}{hint}"))
}

/// The error and its causes, without the insides of the SDK.
fn in_words(error: &(dyn Error + 'static)) -> String {
    anyhow::Chain::new(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The request got no answer of the store's.
fn kind_of_failure<E>(error: &SdkError<E, HttpResponse>) -> StoreErrorKind {
    match error {
        SdkError::ConstructionFailure(_) => StoreErrorKind::Invalid,
        SdkError::TimeoutError(_) => StoreErrorKind::Timeout,
        SdkError::DispatchFailure(failure) if failure.is_timeout() => StoreErrorKind::Timeout,
        SdkError::DispatchFailure(failure) if failure.is_user() => StoreErrorKind::Invalid,
        SdkError::DispatchFailure(failure) if failure.is_io() => StoreErrorKind::Unavailable,
        SdkError::DispatchFailure(failure) => match failure.as_connector_error() {
            // Credentials are looked up before anything is sent, and their absence is reported as a failure to send.
            Some(e) if mentions_credentials(e) => StoreErrorKind::Denied,
            _ => StoreErrorKind::Unavailable,
        },
        _ => StoreErrorKind::Unavailable,
    }
}

fn mentions_credentials(error: &dyn Error) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if text.contains("credentials") || text.contains("identity") {
            return true;
        }
        next = error.source();
    }
    false
}

/// The kind for an HTTP status and S3 error code, and what to do about it.
fn kind_of_answer(status: u16, code: &str) -> (StoreErrorKind, &'static str) {
    use StoreErrorKind::*;
    match (status, code) {
        (_, "NoSuchBucket") => (Invalid, "there is no such bucket; create it, or correct its name, region or endpoint"),
        (_, "SlowDown" | "Throttling" | "ThrottlingException" | "RequestLimitExceeded" | "TooManyRequests") => {
            (Throttled, "")
        }
        (_, "RequestTimeout") => (Timeout, ""),
        (_, "InvalidAccessKeyId") => (Denied, "the store does not know this access key"),
        (_, "SignatureDoesNotMatch") => {
            (Denied, "the secret key is wrong, or something on the way changed the request")
        }
        (_, "ExpiredToken") => (Denied, "the session's credentials have expired"),
        (_, "RequestTimeTooSkewed") => (Denied, "the clock of this host is wrong"),
        (301 | 307, _) => (Invalid, "the bucket is in another region; set the region"),
        (401 | 403, _) => (Denied, "check the credentials, and that they may get, put, list and delete objects here"),
        (404, _) => (NotFound, ""),
        (409, _) => (Unavailable, ""),
        (412, _) => (Precondition, ""),
        (416, _) => (Invalid, "the range reaches past the end of the object"),
        (408, _) => (Timeout, ""),
        (429 | 503, _) => (Throttled, ""),
        (501, _) => (Invalid, "the store does not know this request"),
        // The request may have taken effect, so this must not count as refused.
        (..=399 | 500.., _) => (Unavailable, ""),
        _ => (Invalid, "is this the address of an S3 store?"),
    }
}
