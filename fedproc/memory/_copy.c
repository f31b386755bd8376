/* Copying more bytes than caches hold, past them. It works on addresses; copying.py is its only
 * caller and knows what lies there. The interpreter is released meanwhile.
 *
 * A usual store first reads the line that it writes to. One that goes past the caches does not, so
 * of three times the bytes that cross the bus two are left.
 *
 * Where torch computes with threads, they do it: they stay awake for a while after whatever they
 * did before, and threads of our own would meet them on every core. They belong to GNU's OpenMP
 * library, which torch has loaded, and GOMP_parallel is what a compiler calls for a parallel region.
 */

#define _GNU_SOURCE /* RTLD_DEFAULT */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>

#define LINE 64
/* How far ahead of its use a line is asked for. */
#define AHEAD_BYTES 1024

static void copy_past_caches(char *target, const char *source, size_t count)
{
    size_t head = (size_t)(-(intptr_t)target & (LINE - 1));
    if (head > count)
        head = count;
    memcpy(target, source, head);
    size_t at = head;
    for (; at + LINE <= count; at += LINE) {
        _mm_prefetch(source + at + AHEAD_BYTES, _MM_HINT_NTA); /* past the end it does nothing */
        for (int part = 0; part < LINE; part += 16) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)(source + at + part));
            _mm_stream_si128((__m128i *)(target + at + part), bytes);
        }
    }
    _mm_sfence(); /* whoever is told that it is done sees all of it */
    memcpy(target + at, source + at, count - at);
}
#else
#define copy_past_caches memcpy
#endif

#define PIECE_BYTES ((size_t)1 << 20)

typedef struct {
    char *target;
    const char *source;
    size_t count, next; /* next: what no thread has taken yet */
} Task;

/* What each thread does: piece after piece, so whoever shares its core does fewer. */
static void take_pieces(void *given)
{
    Task *task = given;
    size_t at;
    while ((at = __atomic_fetch_add(&task->next, PIECE_BYTES, __ATOMIC_RELAXED)) < task->count) {
        size_t left = task->count - at;
        copy_past_caches(task->target + at, task->source + at, left < PIECE_BYTES ? left : PIECE_BYTES);
    }
}

/* Call work(task) in this and so many less one of torch's threads; 0 for flags: nothing special. */
static void (*parallel)(void (*work)(void *), void *task, unsigned threads, unsigned flags);

static PyObject *copy(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long target, source;
    Py_ssize_t count;
    unsigned threads;
    if (!PyArg_ParseTuple(args, "KKnI", &target, &source, &count, &threads))
        return NULL;
    if (count < 0 || threads < 1 || (threads > 1 && parallel == NULL)) {
        PyErr_SetString(PyExc_ValueError, "a copy has no fewer than 0 bytes and 1 thread, and no "
                                          "more than 1 where HAS_THREADS says so");
        return NULL;
    }
    Task task = {(char *)(uintptr_t)target, (const char *)(uintptr_t)source, (size_t)count, 0};
    Py_BEGIN_ALLOW_THREADS
    if (threads == 1)
        take_pieces(&task);
    else
        parallel(take_pieces, &task, threads, 0);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"copy", copy, METH_VARARGS,
     "copy(target, source, count, threads)\n--\n\n"
     "Copy bytes from an address to another; they are apart."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "fedproc.memory._copy",
    .m_doc = "Copying past the caches; see fedproc.memory.copying.",
    .m_size = 0,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__copy(void)
{
    *(void **)&parallel = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    PyObject *module = PyModule_Create(&definition);
    if (module != NULL && PyModule_AddIntConstant(module, "HAS_THREADS", parallel != NULL) < 0)
        Py_CLEAR(module);
    return module;
}
