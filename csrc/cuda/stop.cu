// The end of a draft. The one function of CUDA's device runtime that is called here, cudaGraphSetConditional, is the driver's:
// there is nothing to link.
#include "common.cuh"
#include "stop.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#if CUDART_VERSION >= 12040
#define SIRIUS_CONDITIONS
#endif
#endif

namespace sirius::cuda {
namespace {

// One warp.
__global__ void stop_kernel(const StopParams p) {
  wait_for_kernel_before();
  const int lane = int(threadIdx.x);
  if (p.depth == 0) {
    for (int i = lane; i < p.depths; i += kWarp) p.counts[i] = 0;
    for (int i = lane; i < p.depths * p.width; i += kWarp) p.scores[1 + i] = -INFINITY;
    __syncwarp();
  }
  if (lane != 0) return;
  const double *edges = p.rule + 1, *accepted = edges + p.edges, *worth = accepted + p.edges + 1;
  double reach = 1.0;
  bool goes_on = true;
  if (p.depth > 0) {
    goes_on = *p.goes_on && p.counts[p.depth - 1] > 0;
    if (goes_on) {
      const double confidence = p.confidences[p.depth - 1];
      int which = 0;
      while (which < p.edges && edges[which] <= confidence) ++which;
      reach = *p.reach * accepted[which];
    }
  }
  goes_on = goes_on && reach * p.rule[0] >= worth[p.depth];
  *p.reach = reach;
  *p.goes_on = goes_on;
  if (goes_on && p.width == 1) {
    p.counts[p.depth] = 1;
    p.scores[1 + p.depth] = 0.0f;
  }
#if defined(SIRIUS_CONDITIONS)
  if (p.condition) cudaGraphSetConditional(cudaGraphConditionalHandle(p.condition), goes_on);
#endif
}

#if defined(SIRIUS_CONDITIONS)

// What a stream captures into, and what the next node waits for.
struct Capture {
  cudaGraph_t graph = nullptr;
  const cudaGraphNode_t* before = nullptr;
  size_t count = 0;

  explicit Capture(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
#if CUDART_VERSION >= 13000
    const cudaGraphEdgeData* edges = nullptr;
    check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, &before, &edges, &count), "cudaStreamGetCaptureInfo");
#else
    check(cudaStreamGetCaptureInfo_v2(stream, &status, nullptr, &graph, &before, &count), "cudaStreamGetCaptureInfo");
#endif
    if (status != cudaStreamCaptureStatusActive) throw std::runtime_error("condition: this stream is not being captured");
  }
};

#endif

[[maybe_unused]] [[noreturn]] void no_conditions() {
  throw std::runtime_error("condition: built without CUDA's conditional nodes, which need nvcc 12.4 or newer");
}

}  // namespace

void stop(const StopParams& p, Workspace, StreamHandle stream) { launch<stop_kernel>("stop", 1, kWarp, 0, stream, p); }

bool has_conditions() {
#if defined(SIRIUS_CONDITIONS)
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version >= 12040;
#else
  return false;
#endif
}

int64_t new_condition([[maybe_unused]] StreamHandle stream) {
#if defined(SIRIUS_CONDITIONS)
  cudaGraphConditionalHandle condition{};
  const Capture capture(static_cast<cudaStream_t>(stream));
  check(cudaGraphConditionalHandleCreate(&condition, capture.graph, 0, cudaGraphCondAssignDefault),
        "cudaGraphConditionalHandleCreate");
  return int64_t(condition);
#else
  no_conditions();
#endif
}

void begin_if([[maybe_unused]] int64_t condition, [[maybe_unused]] StreamHandle stream, [[maybe_unused]] StreamHandle body) {
#if defined(SIRIUS_CONDITIONS)
  const auto from = static_cast<cudaStream_t>(stream);
  const Capture capture(from);
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = cudaGraphConditionalHandle(condition);
  params.conditional.type = cudaGraphCondTypeIf;
  params.conditional.size = 1;
  cudaGraphNode_t node = nullptr;
#if CUDART_VERSION >= 13000
  check(cudaGraphAddNode(&node, capture.graph, capture.before, nullptr, capture.count, &params), "cudaGraphAddNode");
  check(cudaStreamUpdateCaptureDependencies(from, &node, nullptr, 1, cudaStreamSetCaptureDependencies),
        "cudaStreamUpdateCaptureDependencies");
#else
  check(cudaGraphAddNode(&node, capture.graph, capture.before, capture.count, &params), "cudaGraphAddNode");
  check(cudaStreamUpdateCaptureDependencies(from, &node, 1, cudaStreamSetCaptureDependencies),
        "cudaStreamUpdateCaptureDependencies");
#endif
  check(cudaStreamBeginCaptureToGraph(static_cast<cudaStream_t>(body), params.conditional.phGraph_out[0], nullptr, nullptr, 0,
                                      cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCaptureToGraph");
#else
  no_conditions();
#endif
}

void end_if([[maybe_unused]] StreamHandle body) {
#if defined(SIRIUS_CONDITIONS)
  cudaGraph_t graph = nullptr;  // the node's own
  check(cudaStreamEndCapture(static_cast<cudaStream_t>(body), &graph), "cudaStreamEndCapture");
#else
  no_conditions();
#endif
}

bool is_set(const int32_t* flag, [[maybe_unused]] StreamHandle stream) {
#if defined(__CUDACC__)
  int32_t value = 0;
  check(cudaMemcpyAsync(&value, flag, sizeof(value), cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream)),
        "cudaMemcpyAsync");
  check(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "cudaStreamSynchronize");
  return value != 0;
#else
  simt::finish();
  return *flag != 0;
#endif
}

}  // namespace sirius::cuda
