/* Copying more bytes than caches hold, past them. It works on addresses; copying.py is its only
 * caller and knows what lies there. The interpreter is released meanwhile.
 *
 * A usual store first reads the line that it writes to. One that goes past the caches does not, so
 * of three times the bytes that cross the bus two are left.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
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

static PyObject *copy(PyObject *Py_UNUSED(module), PyObject *args)
{
    unsigned long long target, source;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "KKn", &target, &source, &count))
        return NULL;
    if (count < 0) {
        PyErr_SetString(PyExc_ValueError, "no fewer than 0 bytes can be copied");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    copy_past_caches((char *)(uintptr_t)target, (const char *)(uintptr_t)source, (size_t)count);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"copy", copy, METH_VARARGS,
     "copy(target, source, count)\n--\n\nCopy bytes from an address to another; they are apart."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "fedproc.memory._copy",
    .m_doc = "Copying past the caches; see fedproc.memory.copying.",
    .m_size = 0,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__copy(void) { return PyModule_Create(&definition); }
