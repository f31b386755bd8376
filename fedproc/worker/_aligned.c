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
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#ifndef __GLIBC__
#error "other C libraries lay out their chunks otherwise"
#endif

/* What libc calls its own functions: those that stand behind ours. */
extern void *__libc_calloc(size_t count, size_t size);
extern void __libc_free(void *chunk);
extern void *__libc_memalign(size_t alignment, size_t size);

#define ALIGNMENT 64
#define UNIT 16 /* sizes of chunks are multiples of it */
/* malloc's own word in front of what the user gets. */
#define HEADER sizeof(size_t)
/* Larger ones are rarely asked for, and clearing or filling them takes longer than finding them. */
#define MOST_UNITS 4100
/* Of one thread. Beyond, it starts anew: what nobody asks for any more must not be kept for ever. */
#define MOST_BYTES ((size_t)4 << 20)
/* libc gives a chunk of up to two units more where the rest would be too small for a chunk. */
#define MORE_UNITS 2

typedef struct Chunk {
    struct Chunk *next;
} Chunk;

typedef struct {
    size_t bytes;
    Chunk *first[MOST_UNITS + 1]; /* by size, in units */
} Kept;

/* A pointer only: what is declared thread-local takes room on the stack of every thread. */
static __thread Kept *kept __attribute__((tls_model("initial-exec")));
static pthread_key_t at_exit; /* of a thread */
static int is_ready;

static size_t units_of(const void *chunk)
{
    return (malloc_usable_size((void *)chunk) + HEADER) / UNIT;
}

static void give_back_all(Kept *of)
{
    for (size_t units = 0; units <= MOST_UNITS; units++) {
        Chunk *chunk = of->first[units];
        of->first[units] = NULL;
        while (chunk != NULL) {
            Chunk *next = chunk->next;
            __libc_free(chunk);
            chunk = next;
        }
    }
    of->bytes = 0;
}

static void end_thread(void *of)
{
    kept = NULL; /* what ends after us frees directly, or begins anew and is ended again */
    give_back_all(of);
    __libc_free(of);
}

__attribute__((constructor)) static void begin(void)
{
    is_ready = pthread_key_create(&at_exit, end_thread) == 0;
}

/* Whether this thread keeps chunks from now on; without memory for that, it does not. */
static int begin_thread(void)
{
    if (!is_ready)
        return 0;
    Kept *mine = __libc_calloc(1, sizeof(Kept));
    if (mine != NULL && pthread_setspecific(at_exit, mine) != 0) {
        __libc_free(mine);
        mine = NULL;
    }
    kept = mine;
    return mine != NULL;
}

int posix_memalign(void **chunk, size_t alignment, size_t size)
{
    if (alignment < sizeof(void *) || (alignment & (alignment - 1)) != 0)
        return EINVAL;
    if (alignment == ALIGNMENT && size <= MOST_UNITS * UNIT - HEADER &&
        (kept != NULL || begin_thread())) {
        size_t least = (size + HEADER + UNIT - 1) / UNIT;
        for (size_t units = least; units <= least + MORE_UNITS && units <= MOST_UNITS; units++) {
            Chunk *found = kept->first[units];
            if (found == NULL)
                continue;
            kept->first[units] = found->next;
            kept->bytes -= units * UNIT;
            *chunk = found;
            return 0;
        }
    }
    int before = errno; /* posix_memalign leaves it alone */
    void *made = __libc_memalign(alignment, size);
    errno = before;
    if (made == NULL)
        return ENOMEM;
    *chunk = made;
    return 0;
}

void free(void *chunk)
{
    if (chunk != NULL && ((uintptr_t)chunk & (ALIGNMENT - 1)) == 0 && kept != NULL) {
        size_t units = units_of(chunk);
        if (units <= MOST_UNITS) {
            if (kept->bytes + units * UNIT > MOST_BYTES)
                give_back_all(kept);
            ((Chunk *)chunk)->next = kept->first[units];
            kept->first[units] = chunk;
            kept->bytes += units * UNIT;
            return;
        }
    }
    __libc_free(chunk);
}
