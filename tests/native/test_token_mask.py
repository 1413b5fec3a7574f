"""native/src/token_mask.c against a plain loop, in arrays behind which the process ends."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"

PROGRAM = r"""
#include "mllama.h"
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

static uint32_t state = 1;
static uint32_t draw(void) { return state = state * 1664525u + 1013904223u; }

// The end of a page, behind which nothing may be read or written.
static void * before_the_end(long size) {
    const long page = sysconf(_SC_PAGESIZE), room = 16 * page;
    char * p = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (size > room || p == MAP_FAILED || mprotect(p + room, page, PROT_NONE)) _exit(9);
    return p + room - size;
}

int main(void) {
    char * end_bits = before_the_end(0), * end_logits = before_the_end(0), * end_some = before_the_end(0);
    static const uint32_t WORDS[] = { 0, 1, 0x80000000, 0x11, 0x0f0f0f0f, 0xfffffffe, 0xffffffff };
    int n_tries = 0;
    for (int64_t n_words = 0; n_words < 70; n_words += n_words < 3 ? 1 : 11) {
        for (int64_t n_logits = 0; n_logits < n_words * 32 + 40; n_logits += n_logits < 70 ? 1 : 61) {
            uint32_t * bits = (uint32_t *) end_bits - n_words;
            float * logits = (float *) end_logits - n_logits;
            mllama_candidate * some = (mllama_candidate *) end_some - n_logits;
            for (int64_t i = 0; i < n_words; i++) bits[i] = draw() >> 30 ? WORDS[(draw() >> 8) % 7] : draw();
            for (int64_t i = 0; i < n_logits; i++) logits[i] = (float) ((int) (draw() >> 8) % 50 - 25);
            int64_t best = -1, n = 0;
            const int64_t found = mllama_candidates(logits, n_logits, bits, n_words, some);
            for (int64_t i = 0; i < n_logits && i < n_words * 32; i++) {
                if (!(bits[i / 32] >> i % 32 & 1)) continue;
                if (best < 0 || logits[i] > logits[best]) best = i;
                if (n >= found || some[n].token != i || some[n].logit != logits[i]) return 1;
                n++;
            }
            if (n != found || mllama_likeliest(logits, n_logits, bits, n_words) != best) return 2;
            n_tries++;
        }
    }
    printf("%d\n", n_tries);
    return 0;
}
"""


@pytest.mark.parametrize("flags", ["-O3", "-O0"])
def test_against_a_plain_loop(flags: str, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler, "this test compiles C, as installing the package does: install gcc or clang"
    (tmp_path / "try.c").write_text(PROGRAM)
    sources = [tmp_path / "try.c", NATIVE / "src" / "token_mask.c"]
    command = [compiler, "-std=gnu11", *flags.split(), f"-I{NATIVE / 'include'}", *sources]
    subprocess.run([*command, "-o", tmp_path / "try"], check=True)
    done = subprocess.run([tmp_path / "try"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500
