// The work of one node of a graph, taken by its threads piece by piece, and one way to stop them all.
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

// Must live as long as the graph. One computation at a time.
typedef struct tasks {
    bool        (* stop)(void *); // asked on the calling thread; true: leave, the result does not matter
    void *         stop_data;
    atomic_llong   next;
    atomic_bool    stopped;
    struct tasks * other;         // of another node of the same graph
} tasks;

// Before each time that the graph is computed
static inline void tasks_reset(tasks * t) {
    atomic_store(&t->next, 0);
    atomic_store(&t->stopped, false);
}

// The first of the next `step` tasks, or INT64_MAX after a stop. ith: the thread, of which 0 is the calling one.
static inline int64_t tasks_take(tasks * t, int ith, int64_t step) {
    if (ith == 0 && t->stop && t->stop(t->stop_data)) {
        atomic_store(&t->stopped, true);
    }
    const int64_t first = atomic_fetch_add(&t->next, step);
    return atomic_load(&t->stopped) ? INT64_MAX : first;
}
