/* What the compiled parts of fedproc share. Each includes it once, with NAMES(X) and GIVEN(X)
 * defined: the attributes it reads, as s_name, and the objects of the package it works with. Those
 * that work with a link or a loop define WIRING(X), too: the objects of it that a call touches, in
 * the order of `wire_up` of the same part in Python. None of them is ever replaced by another, so
 * they are found once: a search by name takes as long as what is done with what it finds. */

#ifndef FEDPROC_COMPILED_H
#define FEDPROC_COMPILED_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#define DECLARE_NAME(name) static PyObject *s_##name;
#define DECLARE_GIVEN(name) static PyObject *name;
NAMES(DECLARE_NAME)
GIVEN(DECLARE_GIVEN)

#define INTERN(name) \
    if ((s_##name = PyUnicode_InternFromString(#name)) == NULL) \
        return -1;
#define TAKE(name) \
    if ((name = PyDict_GetItemString(parts, #name)) == NULL) { \
        PyErr_SetString(PyExc_KeyError, #name); \
        return -1; \
    } \
    Py_INCREF(name);

/* Take what is given, by name; once. */
static int take_parts(PyObject *parts)
{
    NAMES(INTERN)
    GIVEN(TAKE)
    return 0;
}

/* ---- numbers in messages: least significant byte first, whatever the order of this machine */

static inline void write_number(unsigned char *at, uint64_t value, int count)
{
    for (int i = 0; i < count; i++)
        at[i] = (unsigned char)(value >> (8 * i));
}

static inline uint64_t read_number(const unsigned char *at, int count)
{
    uint64_t value = 0;
    for (int i = 0; i < count; i++)
        value |= (uint64_t)at[i] << (8 * i);
    return value;
}

/* ---- objects; -1: an error */

static inline PyObject *allocate(PyObject *cls, Py_ssize_t items)
{
    return ((PyTypeObject *)cls)->tp_alloc((PyTypeObject *)cls, items);
}

/* A named tuple, to be filled: its class adds nothing to a tuple. */
static inline PyObject *allocate_tuple(PyObject *cls, Py_ssize_t items)
{
    PyObject *made = allocate(cls, items);
#if PY_VERSION_HEX >= 0x030E0000
    if (made != NULL)
        ((PyTupleObject *)made)->ob_hash = -1; /* not known yet */
#endif
    return made;
}

/* Whether attribute `name` of `owner` is `value`, this very object. */
static inline int is_attribute(PyObject *owner, PyObject *name, PyObject *value)
{
    PyObject *found = PyObject_GetAttr(owner, name);
    Py_XDECREF(found);
    return found == NULL ? -1 : found == value;
}

/* Whether two attributes of `owner` are equal. */
static inline int are_equal(PyObject *owner, PyObject *name, PyObject *other)
{
    PyObject *first = PyObject_GetAttr(owner, name);
    PyObject *second = first == NULL ? NULL : PyObject_GetAttr(owner, other);
    int equal = second == NULL ? -1 : PyObject_RichCompareBool(first, second, Py_EQ);
    Py_XDECREF(first);
    Py_XDECREF(second);
    return equal;
}

/* Count one more in attribute `name`: how many it is now. */
static inline long long add_one(PyObject *owner, PyObject *name)
{
    PyObject *before = PyObject_GetAttr(owner, name);
    long long count = before == NULL ? -1 : PyLong_AsLongLong(before);
    Py_XDECREF(before);
    PyObject *after = PyErr_Occurred() ? NULL : PyLong_FromLongLong(++count);
    int done = after == NULL ? -1 : PyObject_SetAttr(owner, name, after);
    Py_XDECREF(after);
    return done < 0 ? -1 : count;
}

/* What is in a slot of an object, by the slot's descriptor: no search for its name. A new reference. */
static inline PyObject *get_slot(PyObject *slot, PyObject *owner)
{
    return Py_TYPE(slot)->tp_descr_get(slot, owner, (PyObject *)Py_TYPE(owner));
}

static inline int set_slot(PyObject *slot, PyObject *owner, PyObject *value)
{
    return Py_TYPE(slot)->tp_descr_set(slot, owner, value);
}

#ifdef WIRING
#define PLACE(name) at_##name,
enum { WIRING(PLACE) parts_of_wiring };
#define OF(call, name) PyTuple_GET_ITEM((call)->wiring, at_##name)

/* Find the wiring of a link or a loop; 1: done, 0: it has none, so no call is flat, -1: an error. */
static inline int find_wiring(PyObject *owner, PyObject **wiring)
{
    *wiring = PyObject_GetAttr(owner, s_wiring);
    if (*wiring == Py_None)
        Py_SETREF(*wiring, PyObject_CallOneArg(wire_up, owner));
    if (*wiring == NULL)
        return -1;
    return PyTuple_CheckExact(*wiring) && PyTuple_GET_SIZE(*wiring) == parts_of_wiring;
}
#endif

/* A module that is loaded now, as users' functions are looked up in every call: its module may have
 * been loaded anew. NULL without an error: there is none. */
static inline PyObject *loaded_module(PyObject *name)
{
    PyObject *module = PyDict_GetItemWithError(PyImport_GetModuleDict(), name);
    return module == NULL || module == Py_None ? NULL : Py_NewRef(module);
}

/* Whether `function()` gives `value`, this very object. */
static inline int gives(PyObject *function, PyObject *value)
{
    PyObject *given = PyObject_CallNoArgs(function);
    Py_XDECREF(given);
    return given == NULL ? -1 : given == value;
}

#endif
