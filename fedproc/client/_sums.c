/* Weighted sums of float32 vectors in float64, each product and each sum rounded by itself.
 *
 * The bits are those of the torch code in weighing.py, which runs where this was not compiled. It
 * works on addresses; compiled.py is its only caller and checks what lies there. The interpreter
 * is released meanwhile. Nothing here is written by hand for a processor: the loops are plain, and
 * the compiler makes vectors of them.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <float.h>
#include <stddef.h>
#include <stdint.h>

/* What would change the bits must not be built; without this module torch does the work. */
#if defined(__FAST_MATH__)
#error "these sums must be rounded as they are written: compile without -ffast-math"
#endif
#if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0
#error "this processor rounds float64 later than it is told to"
#endif

/* Twice: for AVX2, and for every processor; the loader takes what fits. Neither may fuse a product
 * and a sum: -ffp-contract=off sees to that. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(FEDPROC_ONE_TARGET)
#if defined(__has_attribute)
#if __has_attribute(target_clones)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#endif
#endif
#endif
#ifndef FOR_EACH_PROCESSOR
#define FOR_EACH_PROCESSOR
#endif

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch((const void *)(address))
#else
#define PREFETCH(address) ((void)0)
#endif

/* Sums of so many elements are formed at a time. They fill 64 KiB, so they stay in the second
 * cache, and a run of one vector is 32 KiB: with shorter runs the processor spends its time on
 * finding pages. */
#define BLOCK 8192
/* Elements of one cache line of float32, and how far ahead of its use a line is asked for. */
#define LINE 16
#define AHEAD_BYTES 512
/* Vectors whose products are added in one pass over the sums. */
#define GROUP 8

typedef struct {
    const float *values;
    double weight;
} Term;

FOR_EACH_PROCESSOR
static void add_one(double *restrict sums, const float *restrict values, double weight,
                    ptrdiff_t count)
{
    for (ptrdiff_t i = 0; i < count; i++)
        sums[i] += weight * (double)values[i];
}

/* Adds the products of GROUP terms, one after the other: the sums are read and written once. */
FOR_EACH_PROCESSOR
static void add_group(double *restrict sums, const Term *terms, ptrdiff_t first, ptrdiff_t count)
{
    const float *values[GROUP];
    double weights[GROUP];
    for (int t = 0; t < GROUP; t++) {
        values[t] = terms[t].values + first;
        weights[t] = terms[t].weight;
    }
    ptrdiff_t line = 0;
    for (; line + LINE <= count; line += LINE) {
        for (int t = 0; t < GROUP; t++)
            PREFETCH((uintptr_t)(values[t] + line) + AHEAD_BYTES);
        for (ptrdiff_t i = line; i < line + LINE; i++) {
            double sum = sums[i];
            for (int t = 0; t < GROUP; t++)
                sum += weights[t] * (double)values[t][i];
            sums[i] = sum;
        }
    }
    for (int t = 0; t < GROUP; t++)
        add_one(sums + line, values[t] + line, weights[t], count - line);
}

/* The first addition, to 0.0: what lay there is not read. */
FOR_EACH_PROCESSOR
static void begin(double *restrict sums, const float *restrict values, double weight,
                  ptrdiff_t count)
{
    for (ptrdiff_t i = 0; i < count; i++)
        sums[i] = 0.0 + weight * (double)values[i];
}

FOR_EACH_PROCESSOR
static void divide(float *restrict mean, const double *restrict sums, double whole, ptrdiff_t count)
{
    for (ptrdiff_t i = 0; i < count; i++)
        mean[i] = (float)(sums[i] / whole);
}

static void mean_of_terms(float *mean, const Term *terms, ptrdiff_t vectors, double whole,
                          ptrdiff_t first, ptrdiff_t stop)
{
    _Alignas(64) double sums[BLOCK];
    while (first < stop) {
        const ptrdiff_t count = stop - first < BLOCK ? stop - first : BLOCK;
        ptrdiff_t done = 0;
        for (ptrdiff_t i = 0; i < count; i++)
            sums[i] = -0.0; /* which leaves the first product its sign */
        for (; done + GROUP <= vectors; done += GROUP)
            add_group(sums, terms + done, first, count);
        for (; done < vectors; done++)
            add_one(sums, terms[done].values + first, terms[done].weight, count);
        divide(mean + first, sums, whole, count);
        first += count;
    }
}

static void add_terms(double *sums, const Term *terms, ptrdiff_t vectors, ptrdiff_t count,
                      int is_first)
{
    for (ptrdiff_t first = 0; first < count; first += BLOCK) {
        const ptrdiff_t length = count - first < BLOCK ? count - first : BLOCK;
        ptrdiff_t done = 0;
        if (is_first) {
            begin(sums + first, terms[0].values + first, terms[0].weight, length);
            done = 1;
        }
        for (; done + GROUP <= vectors; done += GROUP)
            add_group(sums + first, terms + done, first, length);
        for (; done < vectors; done++)
            add_one(sums + first, terms[done].values + first, terms[done].weight, length);
    }
}

/* ---------------------------------------------------------------- what Python sees */

/* Address -> pointer; NULL with ValueError if nothing that large and aligned can lie there. */
static void *pointer(unsigned long long address, Py_ssize_t count, size_t size)
{
    if (address == 0 || address % size != 0 || address > UINTPTR_MAX || count < 0
        || (unsigned long long)count > (UINTPTR_MAX - address) / size) {
        PyErr_Format(PyExc_ValueError, "%zd elements of %zu bytes cannot lie at %llu", count, size,
                     address);
        return NULL;
    }
    return (void *)(uintptr_t)address;
}

/* Addresses and weights as terms; NULL with an exception. The caller frees it with PyMem_Free. */
static Term *terms_of(PyObject *addresses, PyObject *weights, Py_ssize_t stop)
{
    const Py_ssize_t vectors = PyTuple_Size(addresses);
    if (vectors < 1 || vectors != PyTuple_Size(weights)) {
        PyErr_Format(PyExc_ValueError, "%zd vectors: give at least one, and a weight for each",
                     vectors);
        return NULL;
    }
    Term *terms = PyMem_Malloc((size_t)vectors * sizeof(Term));
    if (terms == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < vectors; i++) {
        const unsigned long long address =
            PyLong_AsUnsignedLongLong(PyTuple_GetItem(addresses, i));
        if (!PyErr_Occurred())
            terms[i].weight = PyFloat_AsDouble(PyTuple_GetItem(weights, i));
        if (!PyErr_Occurred())
            terms[i].values = pointer(address, stop, sizeof(float));
        if (PyErr_Occurred()) {
            PyMem_Free(terms);
            return NULL;
        }
    }
    return terms;
}

static PyObject *mean(PyObject *module, PyObject *args)
{
    unsigned long long address;
    PyObject *addresses, *weights;
    double whole;
    Py_ssize_t first, stop;
    (void)module;
    if (!PyArg_ParseTuple(args, "KO!O!dnn:mean", &address, &PyTuple_Type, &addresses,
                          &PyTuple_Type, &weights, &whole, &first, &stop))
        return NULL;
    if (first < 0 || first > stop)
        return PyErr_Format(PyExc_ValueError, "no range of elements: %zd to %zd", first, stop);
    float *target = pointer(address, stop, sizeof(float));
    Term *terms = target == NULL ? NULL : terms_of(addresses, weights, stop);
    if (terms == NULL)
        return NULL;
    const Py_ssize_t vectors = PyTuple_Size(addresses);
    Py_BEGIN_ALLOW_THREADS
    mean_of_terms(target, terms, vectors, whole, first, stop);
    Py_END_ALLOW_THREADS
    PyMem_Free(terms);
    Py_RETURN_NONE;
}

static PyObject *add(PyObject *module, PyObject *args)
{
    unsigned long long address;
    PyObject *addresses, *weights;
    Py_ssize_t count;
    int is_first;
    (void)module;
    if (!PyArg_ParseTuple(args, "KO!O!np:add", &address, &PyTuple_Type, &addresses, &PyTuple_Type,
                          &weights, &count, &is_first))
        return NULL;
    double *sums = pointer(address, count, sizeof(double));
    Term *terms = sums == NULL ? NULL : terms_of(addresses, weights, count);
    if (terms == NULL)
        return NULL;
    const Py_ssize_t vectors = PyTuple_Size(addresses);
    Py_BEGIN_ALLOW_THREADS
    add_terms(sums, terms, vectors, count, is_first);
    Py_END_ALLOW_THREADS
    PyMem_Free(terms);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"mean", mean, METH_VARARGS, "mean(mean, values, weights, whole, first, stop)"},
    {"add", add, METH_VARARGS, "add(sums, values, weights, count, is_first)"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "fedproc.client._sums",
    .m_doc = "Weighted sums of float32 vectors in float64; see fedproc.client.compiled.",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__sums(void)
{
    return PyModuleDef_Init(&definition);
}
