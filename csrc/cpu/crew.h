// How many threads a pass is given where others use the CPU, too.
//
// The threads of a pass wait for one another some seven times a layer. One whose core somebody else has stands still for
// milliseconds, longer than a whole layer may take, and with it stand all others: eight threads of which one has half a core are
// half as fast, and seven would be nearly as fast as ever. So passes count for how long their threads were stalled, and while it
// is so much that fewer would have been faster, they get fewer. The bits of a pass do not depend on how many they are.
#pragma once

#include <algorithm>
#include <mutex>

namespace sirius::cpu {

class Crew {
 public:
  // For the next pass, of at most so many.
  int size(int most) {
    const std::lock_guard lock(mutex_);
    if (most != most_) begin(most);
    return most_ - away_;
  }

  // A pass of so many threads took so long. stalled: seconds that its threads stood still, together (Barrier).
  void passed(int threads, double seconds, double stalled) {
    const std::lock_guard lock(mutex_);
    if (threads != most_ - away_) return;  // asked for before the last change
    seconds_ += seconds;
    if (threads > 1) stalled_ += stalled / (threads - 1);  // while one is kept from its work all others stand
    if (seconds_ < kEpoch) return;
    const double share = stalled_ / seconds_;
    seconds_ = stalled_ = 0;
    if (threads > 1 && share > kMargin / threads) {  // the others would take 1 / (threads - 1) more
      ++away_;
      patience_ = trial_ ? std::min(2 * patience_, kLongest) : kFirst;
      left_ = patience_;
      trial_ = false;
    } else if (trial_) {
      trial_ = false;
      left_ = patience_ = kFirst;
    } else if (away_ && --left_ <= 0) {
      --away_;
      trial_ = true;
    }
  }

 private:
  static constexpr double kEpoch = 0.25;  // seconds of passes after which it is looked at: many times what others take at once
  static constexpr double kMargin = 1.25;
  static constexpr int kFirst = 4, kLongest = 64;  // epochs until one more is tried; twice as many each time that was too many

  void begin(int most) {
    most_ = most;
    away_ = left_ = 0;
    patience_ = kFirst;
    trial_ = false;
    seconds_ = stalled_ = 0;
  }

  std::mutex mutex_;
  int most_ = 0, away_ = 0, patience_ = kFirst, left_ = 0;
  bool trial_ = false;  // of one more, in this epoch
  double seconds_ = 0, stalled_ = 0;
};

}  // namespace sirius::cpu
