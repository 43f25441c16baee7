// The MLPs' weights of a model that is larger than the device's memory: some stay there, the others come from pinned host memory
// while the full model reads.
//
// A layer is one image or more (models/tier_files.py); so is what is read after the layers, the head, in parts. Every image has a
// stretch of addresses of its own, each behind the one before (q8.cuh counts on lower nibbles behind the upper ones), so that its
// matrices are ordinary ones for whoever reads them. What comes in whole multiples of granularity() stands side by side. Its
// first `resident` bytes are memory for good. The memory behind the others is that of a ring of few buffers: all layers whose
// numbers leave the same remainder share them, and hold their own bytes between `need` and `done` alone.
//
// A sparse model that reads an image has slots beside that, each for a neuron that is not resident. They stand behind the
// resident bytes, in a stretch of addresses that has these once more, so that they are rows of one matrix. `hold` (ops.h) fills
// them, and what is there does not come from host memory a second time.
//
// None of what a pass calls waits for the device, so that all of it can be captured in a graph: copies are on a stream of their
// own, which begins where `ahead` is called and has ended when the last layer is done. One such stream is enough: its copies come
// one after another without a pause, and more of them would share the link. What goes the other way (`to_host`) does not.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "ops.h"

namespace sirius::cuda {

// One image of a layer, in bytes.
struct StreamedImage {
  int64_t nbytes;
  int64_t resident;  // its first ones that stay on the device; all, or a multiple of WeightStream::granularity()
  int64_t slots;     // of memory behind these for a sparse model; 0 if all are resident
};

// Pinned memory of the host, which the device reads at the same addresses.
class PinnedMemory {
 public:
  explicit PinnedMemory(int64_t nbytes);  // std::bad_alloc that says so if there is none
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;

  char* data() const { return data_; }

 private:
  char* data_;
};

// What comes after this on the stream finds bytes of the device in pinned host memory, too.
void to_host(const void* from, void* to, size_t nbytes, StreamHandle stream);

class WeightStream {
 public:
  // On the current device; each layer with as many images as every other. std::bad_alloc that says whose memory is not there.
  WeightStream(std::vector<std::vector<StreamedImage>> layers, int buffers);
  ~WeightStream();
  WeightStream(const WeightStream&) = delete;

  // Bytes of device memory that can be had by itself.
  static int64_t granularity();

  // Where an image is on the device, and in pinned host memory those of its bytes that are not resident; to be filled before
  // anything else.
  char* image(int layer, int number) const;
  char* host(int layer, int number) const;
  // Where its resident bytes are once more, with the slots behind them. Null if there are none.
  char* slots(int layer, int number) const;
  // Where the neurons of every layer's first image are that are in slots: HeldLayer's and HoldParams' (ops.h). To be called
  // before any pass, if there are slots. No pass may be on its way when a neuron comes into a slot.
  void share(const HeldLayer* held, const int32_t* row_of, int intermediate);

  int num_layers() const;  // with those of the head

  // What follows is on a stream, as a pass is. The first layers of the pass that comes next, which is of layers first to last -
  // 1, are copied from here on, unless one from `first` on was asked for before. All that has read the ring must be on the
  // stream.
  void ahead(int first, int last, StreamHandle stream);
  // What comes after this finds all of a layer. Layers come in order, from the first one of the pass on.
  void need(int layer, StreamHandle stream);
  // Nothing after this reads the layer: its buffer is another's.
  void done(int layer, StreamHandle stream);
  // The pass goes no further: what comes after this may begin another.
  void end(StreamHandle stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sirius::cuda
