// The neurons of a model that is larger than the memory: some stay, the others arrive from one file while the full model reads.
//
// In the file a layer is a few images, each an array of bundles. In the first ones a bundle is a neuron's, and holds a row of
// each matrix; others are matrices one after the other, in blocks. What is read after the layers, the head, is like some layers
// more. Here every image has a stretch of addresses of its own, one after the other, so that its matrices are ordinary ones for
// whoever reads them. The first `resident` bundles are in memory for good. The pages behind the others are those of a ring of few
// buffers: all layers whose numbers leave the same remainder share them, and hold what is their own between `need` and `done`
// alone.
//
// A sparse model that reads the first image has slots beside that, each for a neuron that is not resident. They are found by the
// tables of `places`.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace sirius::cpu {

// The file could not be read, or holds something else than it should.
struct StreamError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One image of a layer.
struct StreamImage {
  int64_t at;      // in the file, a multiple of kPage
  int64_t bundle;  // bytes
  int64_t nbytes;  // of the image, a multiple of kPage
  int rows;        // bundles
  int resident;    // its first bundles that stay in memory; all of them, or as many as fill whole pages
};

struct StreamOptions {
  std::string path;
  int rows = 0;                                  // neurons of a layer
  std::vector<std::vector<StreamImage>> layers;  // each with one image or two
  std::vector<uint32_t> checks;                  // of every bundle (checks.h), by layer, image, neuron
  int buffers = 2;                               // of the ring
  int slots = 0;                                 // of every layer
  int readers = 4;                               // threads
  double patience = 60;                          // seconds without a byte after which the file is given up
};

struct StreamStatistics {
  int64_t bytes = 0;    // read from the file, but for those that were resident from the beginning
  int64_t fetched = 0;  // of these, for slots alone
  double busy = 0;      // seconds in which something was being read
  double waited = 0;    // seconds in which a pass waited for it
};

class Stream {
 public:
  static constexpr int64_t kPage = 4096;

  explicit Stream(StreamOptions options);
  ~Stream();
  Stream(const Stream&) = delete;

  // Reads a layer's resident bundles. To be called for each layer before anything else.
  void fill(int layer);

  // Where an image of a layer is.
  char* image(int layer, int number) const;
  // Where the first image's bundles are that a sparse model may read, by neuron; null where they are nowhere: [rows].
  const char* const* places(int layer) const;

  // Waits until all of a layer is there, and has the next ones read on. StreamError if what this call reads cannot be had; what
  // failed while it was read on is read again.
  void need(int layer);
  // The layer is not read any more: its buffer is free for another.
  void done(int layer);

  // Has the neurons of every layer's list, [layers, count], in slots if they are not resident.
  void hold(const int32_t* neurons, int count);
  // Of a layer that is needed right now: keeps those neurons of a list in slots that are not resident; of more than there are
  // slots, the first; none while readers are still at what a call of `hold` that gave up had asked for.
  void keep(int layer, const int32_t* neurons, int count);

  int slots() const;
  int num_layers() const;  // with those of the head
  StreamStatistics statistics() const;

 private:
  struct State;
  std::shared_ptr<State> state_;  // a thread that never returns from a read keeps it
};

}  // namespace sirius::cpu
