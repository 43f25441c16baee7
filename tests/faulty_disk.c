// Loaded before the C library: reads of one file go wrong as they are told to. For tests/test_stream.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { kNone, kShort, kFails, kSlow, kStalls, kChanged, kEnds, kFailsLate };

static int kind = kNone, after = 0, calls = 0, faults = 0;
static unsigned seed = 1;
static char name[256] = "";
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

// From now on, reads of files whose path ends like this go wrong, but for the first `good` ones.
void set_fault(int what, int good, const char* path) {
  pthread_mutex_lock(&mutex);
  kind = what, after = good, calls = faults = 0;
  strncpy(name, path, sizeof name - 1);
  pthread_mutex_unlock(&mutex);
}

// How many reads have, or are about to.
int count_faults(void) {
  pthread_mutex_lock(&mutex);
  const int now = faults;
  pthread_mutex_unlock(&mutex);
  return now;
}

static int is_ours(int file) {
  char link[64], path[512];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t n = readlink(link, path, sizeof path - 1);
  const size_t wanted = strlen(name);
  if (n < 0 || !wanted || (size_t)n < wanted) return 0;
  path[n] = 0;
  return strcmp(path + n - wanted, name) == 0;
}

static ssize_t really(int file, void* to, size_t size, off_t at) {
  static ssize_t (*next)(int, void*, size_t, off_t);
  if (!next) next = (ssize_t(*)(int, void*, size_t, off_t))dlsym(RTLD_NEXT, "pread");
  return next(file, to, size, at);
}

ssize_t pread(int file, void* to, size_t size, off_t at) {
  if (!is_ours(file)) return really(file, to, size, at);
  pthread_mutex_lock(&mutex);
  const int now = calls++ >= after ? kind : kNone;
  faults += now != kNone;
  const unsigned random = rand_r(&seed);
  pthread_mutex_unlock(&mutex);
  switch (now) {
    case kShort:  // some bytes, a page or not
      if (random % 5 == 0) return errno = EINTR, -1;
      return really(file, to, size > 512 ? 512 * (1 + random / 8 % (size / 512)) : size, at);
    case kFailsLate:
      usleep(200000);
      // fallthrough
    case kFails:
      return errno = EIO, -1;
    case kSlow:  // by times that differ, so that what was asked for first comes last
      usleep(random / 8 % 5000);
      break;
    case kStalls:
      for (;;) pause();
    case kEnds:
      return 0;
    case kChanged: {
      const ssize_t n = really(file, to, size, at);
      if (n > 0) ((char*)to)[random / 8 % (n < 576 ? n : 576)] ^= 1;
      return n;
    }
  }
  return really(file, to, size, at);
}

ssize_t pread64(int file, void* to, size_t size, off_t at) { return pread(file, to, size, at); }
