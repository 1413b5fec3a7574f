// Whether this processor has tiles and this process may use them. Compiled for every processor of the architecture.
#include "kernels/kernel.h"

#include <cpuid.h>
#include <errno.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    TILES_LEAF     = 0x1d, // of CPUID: the kinds of tiles, in its subleaves
    REQUEST        = 0x1023, // ARCH_REQ_XCOMP_PERM
    TILE_DATA      = 18,     // XFEATURE_XTILEDATA
    BF16_BIT       = 1 << 22,
    TILE_BIT       = 1 << 24,
    INT8_BIT       = 1 << 25,
};

static bool has_tiles(void) {
    unsigned int eax, ebx, ecx, edx;
    const unsigned int bits = BF16_BIT | TILE_BIT | INT8_BIT;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & bits) != bits) {
        return false;
    }
    // the first kind: 8 tiles of 16 rows of 64 bytes
    return __get_cpuid_count(TILES_LEAF, 1, &eax, &ebx, &ecx, &edx) && ebx == (8u << 16 | 64) && (ecx & 0xffff) == 16;
}

// Linux keeps the tiles of a process that has asked for them. The answer holds for all its threads and for its
// children. Older kernels do not know the request, some sandboxes refuse it, and so does Linux where the signal stack
// of a thread is too small for tiles.
static bool may_use_tiles(void) {
    static atomic_int answer; // 0: not asked
    if (atomic_load(&answer) == 0) {
        const int before = errno;
        atomic_store(&answer, syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0 ? 1 : -1);
        errno = before;
    }
    return atomic_load(&answer) == 1;
}

bool amx_supported(void) {
    return has_tiles() && may_use_tiles();
}
