// Where ONNX Runtime runs the graphs, and with which kernels.
#pragma once

#include <onnxruntime_cxx_api.h>

#include "enat/enat.hpp"
#include "graphs.hpp"
#include "manifest.hpp"

namespace enat {

/// Settings for the session of one of an engine's graphs. Throws InputError for options out of their range, BackendError where this build
/// of ONNX Runtime does not have the execution provider or cannot start it.
Ort::SessionOptions make_session_options(Ort::Env& env, const Manifest& manifest, const Options& options, Graph graph);

}  // namespace enat
