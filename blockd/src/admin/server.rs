//! HTTP on the admin socket.

use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete as delete_of, get, post};
use axum::{Json, Router};

use super::api::{
    ChangeKey, ChangesQuery, CloneVolume, CopyRange, CreateSnapshot, CreateVolume, DeleteVolume, ErrorBody,
    ExportStranded, Forced, ResizeVolume, RestoreVolume, SetVolume, UnlockVolume,
};
use super::metrics;
use crate::daemon::{Daemon, VolumeError};

/// All routes, for the admin socket.
pub fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/info", get(|State(d): State<Arc<Daemon>>| async move { Json(d.info()) }))
        .route("/v1/status", get(|State(d): State<Arc<Daemon>>| async move { Json(d.status().await) }))
        .route("/v1/volumes", get(list).post(create))
        .route("/v1/volumes/{name}", get(show).delete(delete))
        .route("/v1/volumes/{name}/open", post(open))
        .route("/v1/volumes/{name}/release", post(release))
        .route("/v1/volumes/{name}/stranded/export", post(export_stranded))
        .route("/v1/volumes/{name}/stranded/discard", post(discard_stranded))
        .route("/v1/stranded", get(stranded))
        .route("/v1/volumes/{name}/resize", post(resize))
        .route("/v1/volumes/{name}/copy", post(copy))
        .route("/v1/volumes/{name}/unlock", post(unlock))
        .route("/v1/volumes/{name}/key", post(change_key))
        .route("/v1/volumes/{name}/set", post(set))
        .route("/v1/snapshots", get(all_snapshots))
        .route("/v1/volumes/{name}/snapshots", get(snapshots).post(create_snapshot))
        .route("/v1/volumes/{name}/snapshots/{snapshot}", delete_of(delete_snapshot))
        .route("/v1/volumes/{name}/snapshots/{snapshot}/changes", get(changes))
        .route("/v1/volumes/{name}/clone", post(clone_volume))
        .route("/v1/volumes/{name}/restore", post(restore))
        .route("/v1/volumes/{name}/rebuild", get(rebuild_progress).post(rebuild))
        .route("/metrics", get(scrape))
        .fallback(|| async { Refusal(StatusCode::NOT_FOUND, "no such path".into()) })
        .with_state(daemon)
}

/// Metrics only, for a TCP address that strangers may reach.
pub fn metrics_router(daemon: Arc<Daemon>) -> Router {
    Router::new().route("/metrics", get(scrape)).with_state(daemon)
}

/// An answer that is not a success.
struct Refusal(StatusCode, String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}

impl From<VolumeError> for Refusal {
    fn from(error: VolumeError) -> Self {
        let status = match &error {
            VolumeError::Unknown(_) => StatusCode::NOT_FOUND,
            VolumeError::Invalid(_) => StatusCode::BAD_REQUEST,
            VolumeError::Conflict(_) => StatusCode::CONFLICT,
            VolumeError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
            VolumeError::Away(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self(status, error.to_string())
    }
}

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        Self(StatusCode::BAD_REQUEST, rejection.body_text())
    }
}

impl From<QueryRejection> for Refusal {
    fn from(rejection: QueryRejection) -> Self {
        Self(StatusCode::BAD_REQUEST, rejection.body_text())
    }
}

/// Runs `work` to its end even if the client hangs up: half a deletion helps nobody.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, VolumeError>> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::spawn(work).await {
        Ok(result) => Ok(result?),
        Err(panic) => Err(Refusal(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("the operation ended unexpectedly ({panic}); the daemon's log has more"),
        )),
    }
}

async fn list(State(daemon): State<Arc<Daemon>>) -> Response {
    Json(daemon.volumes().await).into_response()
}

async fn show(State(daemon): State<Arc<Daemon>>, Path(name): Path<String>) -> Result<Response, Refusal> {
    Ok(Json(daemon.show(&name).await?).into_response())
}

async fn create(
    State(daemon): State<Arc<Daemon>>,
    request: Result<Json<CreateVolume>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(request) = request?;
    let status = to_the_end(async move { daemon.create(request).await }).await?;
    Ok((StatusCode::CREATED, Json(status)).into_response())
}

async fn open(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Query<Forced>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(request) = request?;
    let status = to_the_end(async move { daemon.open(&name, request.force).await }).await?;
    Ok(Json(status).into_response())
}

async fn release(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Query<Forced>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(request) = request?;
    let status = to_the_end(async move { daemon.release(&name, request.force).await }).await?;
    Ok(Json(status).into_response())
}

async fn stranded(State(daemon): State<Arc<Daemon>>) -> Result<Response, Refusal> {
    Ok(Json(daemon.stranded().await?).into_response())
}

async fn export_stranded(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Json<ExportStranded>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(request) = request?;
    let exported = to_the_end(async move { daemon.export_stranded(&name, request).await }).await?;
    Ok(Json(exported).into_response())
}

async fn discard_stranded(State(daemon): State<Arc<Daemon>>, Path(name): Path<String>) -> Result<Response, Refusal> {
    let status = to_the_end(async move { daemon.discard_stranded(&name).await }).await?;
    Ok(Json(status).into_response())
}

async fn rebuild(State(daemon): State<Arc<Daemon>>, Path(name): Path<String>) -> Result<Response, Refusal> {
    let status = to_the_end(async move { daemon.rebuild(&name).await }).await?;
    Ok(Json(status).into_response())
}

async fn rebuild_progress(State(daemon): State<Arc<Daemon>>, Path(name): Path<String>) -> Response {
    Json(daemon.rebuild_progress(&name)).into_response()
}

async fn copy(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Json<CopyRange>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(request) = request?;
    daemon.copy(&name, request).await?;
    Ok(Json(()).into_response())
}

async fn resize(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Json<ResizeVolume>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(request) = request?;
    let status = to_the_end(async move { daemon.resize(&name, request).await }).await?;
    Ok(Json(status).into_response())
}

async fn unlock(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Json<UnlockVolume>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(request) = request?;
    let status = to_the_end(async move { daemon.unlock(&name, &request.secret).await }).await?;
    Ok(Json(status).into_response())
}

async fn change_key(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Json<ChangeKey>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(request) = request?;
    let status = to_the_end(async move { daemon.change_key(&name, &request).await }).await?;
    Ok(Json(status).into_response())
}

async fn set(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Json<SetVolume>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(request) = request?;
    let status = to_the_end(async move { daemon.set(&name, &request).await }).await?;
    Ok(Json(status).into_response())
}

async fn delete(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Query<DeleteVolume>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(request) = request?;
    to_the_end(async move { daemon.delete(&name, request.force).await }).await?;
    Ok(Json(serde_json::json!({})).into_response())
}

async fn all_snapshots(State(daemon): State<Arc<Daemon>>) -> Result<Response, Refusal> {
    Ok(Json(daemon.snapshots(None).await?).into_response())
}

async fn changes(
    State(daemon): State<Arc<Daemon>>,
    Path((name, snapshot)): Path<(String, String)>,
    query: Result<Query<ChangesQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(query) = query?;
    Ok(Json(daemon.changes(&name, &query.since, &snapshot, query.start).await?).into_response())
}

async fn snapshots(State(daemon): State<Arc<Daemon>>, Path(name): Path<String>) -> Result<Response, Refusal> {
    Ok(Json(daemon.snapshots(Some(&name)).await?).into_response())
}

async fn create_snapshot(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Json<CreateSnapshot>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(request) = request?;
    let made = to_the_end(async move { daemon.create_snapshot(&name, &request.name).await }).await?;
    Ok((StatusCode::CREATED, Json(made)).into_response())
}

async fn delete_snapshot(
    State(daemon): State<Arc<Daemon>>,
    Path((name, snapshot)): Path<(String, String)>,
) -> Result<Response, Refusal> {
    to_the_end(async move { daemon.delete_snapshot(&name, &snapshot).await }).await?;
    Ok(Json(serde_json::json!({})).into_response())
}

async fn clone_volume(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Json<CloneVolume>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(request) = request?;
    let status = to_the_end(async move { daemon.clone_volume(&name, request).await }).await?;
    Ok((StatusCode::CREATED, Json(status)).into_response())
}

async fn restore(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    request: Result<Json<RestoreVolume>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(request) = request?;
    let status = to_the_end(async move { daemon.restore(&name, request).await }).await?;
    Ok(Json(status).into_response())
}

async fn scrape(State(daemon): State<Arc<Daemon>>) -> Response {
    let text = metrics::render(&daemon.status().await);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
