// The instructions of AMX on a processor that does not have them: each raises SIGILL, and the handler computes what its
// bytes ask for, with the tiles of amx_emulated.c. So what the compiler has made of kernels/amx.h is tested: the order
// of operands, and that a configuration is in memory when it is loaded. Instructions as in Intel's manual, volume 2.
//
// Where the processor has tiles and may use them nothing is trapped, and they compute.
#define _GNU_SOURCE // names of registers
#define MLLAMA_AMX_EMULATED
#include "check.h"
#include "kernels/amx.h"

#include <signal.h>
#include <ucontext.h>

enum {
    VEX = 0xc4, MAP = 2, // of three bytes; opcodes 0f 38
    CONFIGURE = 0x49, MOVE = 0x4b, BF16 = 0x5c, INT8 = 0x5e,
    NONE = 0, X66 = 1, XF3 = 2, XF2 = 3, // prefixes
    REGISTER = 3, SIB = 4, NO_BASE = 5,  // of the byte "ModRM"
};

static void (* others)(int signal);

// An instruction's parts
typedef struct instruction {
    int             prefix, opcode, mod, reg, rm, v;
    uintptr_t       address; // of its operand in memory
    int64_t         stride;  // the index of that
    const uint8_t * next;
} instruction;

static int64_t register_at(const ucontext_t * context, int i) {
    static const int names[16] = {
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
        REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
    };
    return context->uc_mcontext.gregs[names[i]];
}

static bool decode(const ucontext_t * context, instruction * i) {
    const uint8_t * p = (const uint8_t *) (uintptr_t) context->uc_mcontext.gregs[REG_RIP];
    if (p[0] != VEX || (p[1] & 0x1f) != MAP || (p[2] & 0x84) != 0) { // W and L are 0
        return false;
    }
    const int x = p[1] & 0x40 ? 0 : 8, b = p[1] & 0x20 ? 0 : 8; // these bits and v are inverted
    *i = (instruction) {
        .prefix = p[2] & 3, .v = ~p[2] >> 3 & 15, .opcode = p[3],
        .mod = p[4] >> 6, .reg = p[4] >> 3 & 7, .rm = p[4] & 7,
    };
    if (!(p[1] & 0x80)) {
        return false; // no tile has such a number
    }
    p += 5;
    if (i->mod != REGISTER) {
        int  base = i->rm;
        bool from_rip = false, none = false;
        if (i->rm == SIB) {
            const int index = (*p >> 3 & 7) + x;
            base = *p & 7;
            i->stride = index == SIB ? 0 : register_at(context, index) * (1 << (*p >> 6));
            none = base == NO_BASE && i->mod == 0;
            p++;
        } else {
            from_rip = base == NO_BASE && i->mod == 0;
        }
        int32_t distance = 0;
        if (i->mod == 1) {
            distance = (int8_t) *p++;
        } else if (i->mod == 2 || none || from_rip) {
            memcpy(&distance, p, sizeof(distance));
            p += sizeof(distance);
        }
        const uintptr_t from = none ? 0 : from_rip ? (uintptr_t) p : (uintptr_t) register_at(context, base + b);
        i->address = from + (uintptr_t) (intptr_t) distance;
    }
    i->next = p;
    return true;
}

static bool compute(const instruction * i) {
    const bool memory = i->mod != REGISTER;
    void *     at     = (void *) (memory && i->opcode == CONFIGURE ? i->address + (uintptr_t) i->stride : i->address);
    switch (i->opcode << 8 | i->prefix) {
        case CONFIGURE << 8 | NONE:
            if (memory) {
                amx_emulated_configure(at);
            } else {
                amx_emulated_release();
            }
            return memory || (i->reg == 0 && i->rm == 0);
        case CONFIGURE << 8 | XF2:
            amx_emulated_zero(i->reg);
            return !memory && i->rm == 0;
        case MOVE << 8 | XF2:
            amx_emulated_load(i->reg, at, i->stride);
            return memory && i->rm == SIB;
        case MOVE << 8 | XF3:
            amx_emulated_store(i->reg, at, i->stride);
            return memory && i->rm == SIB;
        case BF16 << 8 | XF3:
            amx_emulated_multiply_bf16(i->reg, i->rm, i->v);
            return !memory;
        case INT8 << 8 | XF2:
            amx_emulated_multiply_int8(i->reg, i->rm, i->v, true);
            return !memory;
        case INT8 << 8 | XF3:
            amx_emulated_multiply_int8(i->reg, i->rm, i->v, false);
            return !memory;
        default:
            return false;
    }
}

static void on_trap(int signal, siginfo_t * info, void * data) {
    ucontext_t * context = data;
    instruction  i;
    (void) info;
    if (decode(context, &i) && compute(&i)) {
        context->uc_mcontext.gregs[REG_RIP] = (greg_t) (uintptr_t) i.next;
    } else {
        others(signal);
    }
}

void amx_trap(void (* otherwise)(int signal)) {
    others = otherwise;
    struct sigaction action = { .sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER };
    sigaction(SIGILL, &action, NULL);
}
