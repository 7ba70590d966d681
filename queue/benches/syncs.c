/* Preloaded into a benchmark: counts syncs in the first eight bytes of a file, and makes each take longer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t *count;
static struct timespec delay;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("SYNC_COUNT"), *microseconds = getenv("SYNC_DELAY");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *map = file < 0 ? MAP_FAILED : mmap(0, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    count = map == MAP_FAILED ? 0 : map;
    delay.tv_nsec = microseconds ? atol(microseconds) * 1000 : 0;
}

static int slowed(const char *name, int file) {
    if (count) __atomic_add_fetch(count, 1, __ATOMIC_RELAXED);
    if (delay.tv_nsec) nanosleep(&delay, 0);
    int (*sync)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return sync(file);
}

int fsync(int file) { return slowed("fsync", file); }
int fdatasync(int file) { return slowed("fdatasync", file); }
