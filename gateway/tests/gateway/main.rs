//! The gateway in this process, in front of workers whose behaviour the tests choose.

mod grpc;
mod http_api;
mod process;
mod support;
