/* Aligned chunks of memory that a thread of a worker keeps to use them again.
 *
 * Runs in worker processes, loaded before libc (LD_PRELOAD): its two functions stand in front of
 * libc's own. Torch and oneDNN ask for everything aligned to 64 bytes, one step of a small
 * convolutional model a thousand times, oneDNN for its descriptions most of all. libc cuts each
 * out of a larger chunk and gives the rests back, which is a tenth of such a step.
 *
 * What is kept are ordinary chunks of libc, so whoever got one may free it anywhere, in any thread,
 * and a chunk that came from elsewhere in libc may be kept as well.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef __GLIBC__
#error "other C libraries lay out their chunks otherwise"
#endif

/* What libc calls its own functions: those that stand behind ours. */
extern void *__libc_calloc(size_t count, size_t size);
extern void __libc_free(void *chunk);
extern void *__libc_memalign(size_t alignment, size_t size);
/* Calls a function when a thread ends. Unlike pthread_key_create, libc has it in one version only,
 * and a library that is loaded in front of it and asks for a newer one stops the program. */
extern int __cxa_thread_atexit_impl(void (*function)(void *), void *given, void *library);
extern void *__dso_handle __attribute__((visibility("hidden")));

#define ALIGNMENT 64
#define UNIT 16 /* sizes of chunks are multiples of it */
/* malloc's own word in front of what the user gets. */
#define HEADER sizeof(size_t)
/* Larger ones are rarely asked for, and clearing or filling them takes longer than finding them. */
#define MOST_UNITS 4100
#define LEAST_UNITS 2
/* Of one thread. Beyond, it starts anew: what nobody asks for any more must not be kept for ever. */
#define MOST_BYTES ((size_t)4 << 20)
/* libc gives a chunk of up to two units more where the rest would be too small for a chunk. */
#define MORE_UNITS 2

typedef struct Chunk {
    struct Chunk *next;
} Chunk;

/* The chunks of one size. As many are kept as were once missing: free cannot tell who asked for a
 * chunk, and one that malloc gave, which never comes here, would be kept from malloc in vain. */
typedef struct {
    Chunk *first;
    uint32_t count, missed;
} Size;

typedef struct {
    size_t bytes;
    Size sizes[MOST_UNITS + 1]; /* in units */
} Kept;

/* A pointer only: what is declared thread-local takes room on the stack of every thread. */
static __thread Kept *kept __attribute__((tls_model("initial-exec")));
static __thread int has_ended __attribute__((tls_model("initial-exec")));

static size_t units_of(const void *chunk)
{
    return (malloc_usable_size((void *)chunk) + HEADER) / UNIT;
}

static void give_back_all(Kept *of)
{
    for (size_t units = 0; units <= MOST_UNITS; units++) {
        Chunk *chunk = of->sizes[units].first;
        while (chunk != NULL) {
            Chunk *next = chunk->next;
            __libc_free(chunk);
            chunk = next;
        }
    }
    memset(of, 0, sizeof(Kept)); /* also what was missing: other sizes may be by now */
}

static void end_thread(void *of)
{
    kept = NULL;
    has_ended = 1; /* whoever frees later in the end of the thread frees directly */
    give_back_all(of);
    __libc_free(of);
}

/* Whether this thread keeps chunks from now on; without memory for that, it does not. */
static int begin_thread(void)
{
    if (has_ended)
        return 0;
    Kept *mine = __libc_calloc(1, sizeof(Kept));
    if (mine != NULL && __cxa_thread_atexit_impl(end_thread, mine, &__dso_handle) != 0) {
        __libc_free(mine);
        mine = NULL;
    }
    kept = mine;
    return mine != NULL;
}

static void *take(size_t size)
{
    size_t least = (size + HEADER + UNIT - 1) / UNIT;
    if (least < LEAST_UNITS)
        least = LEAST_UNITS;
    for (size_t units = least; units <= least + MORE_UNITS && units <= MOST_UNITS; units++) {
        Size *of = &kept->sizes[units];
        Chunk *found = of->first;
        if (found == NULL)
            continue;
        of->first = found->next;
        of->count--;
        kept->bytes -= units * UNIT;
        return found;
    }
    return NULL;
}

int posix_memalign(void **chunk, size_t alignment, size_t size)
{
    if (alignment < sizeof(void *) || (alignment & (alignment - 1)) != 0)
        return EINVAL;
    int before = errno; /* posix_memalign leaves it alone */
    int keeps = alignment == ALIGNMENT && size <= MOST_UNITS * UNIT - HEADER &&
                (kept != NULL || begin_thread());
    void *found = keeps ? take(size) : NULL;
    if (found == NULL) {
        found = __libc_memalign(alignment, size);
        errno = before;
        if (found == NULL)
            return ENOMEM;
        size_t units = units_of(found);
        if (keeps && units <= MOST_UNITS)
            kept->sizes[units].missed++;
    }
    *chunk = found;
    return 0;
}

void free(void *chunk)
{
    if (chunk != NULL && ((uintptr_t)chunk & (ALIGNMENT - 1)) == 0 && kept != NULL) {
        size_t units = units_of(chunk);
        if (units <= MOST_UNITS && kept->sizes[units].count < kept->sizes[units].missed) {
            if (kept->bytes + units * UNIT > MOST_BYTES) {
                give_back_all(kept);
                __libc_free(chunk);
                return;
            }
            Size *of = &kept->sizes[units];
            ((Chunk *)chunk)->next = of->first;
            of->first = chunk;
            of->count++;
            kept->bytes += units * UNIT;
            return;
        }
    }
    __libc_free(chunk);
}
