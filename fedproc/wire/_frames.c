/* Cutting frames out of a byte stream: see frames.py, whose `cut` this is, compiled. */

#define NAMES(X)
#define GIVEN(X) X(frame_class) X(protocol_error)

#include "_compiled.h"

#define HEADER_BYTES 20

static unsigned version;
static unsigned long long largest_body;

static PyObject *make_frame(const unsigned char *header, uint64_t length)
{
    PyObject *fields[] = {
        PyLong_FromLong(header[1]),
        PyLong_FromLong((long)read_number(header + 2, 2)),
        PyLong_FromUnsignedLongLong(read_number(header + 8, 8)),
        PyBytes_FromStringAndSize((const char *)header + HEADER_BYTES, (Py_ssize_t)length),
    };
    PyObject *frame = allocate_tuple(frame_class, 4);
    int whole = frame != NULL;
    for (int i = 0; i < 4; i++) {
        whole = whole && fields[i] != NULL;
        if (frame != NULL)
            PyTuple_SET_ITEM(frame, i, fields[i]);
        else
            Py_XDECREF(fields[i]);
    }
    if (!whole)
        Py_CLEAR(frame);
    return frame;
}

static PyObject *cut(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    if (count != 2 || !PyBytes_CheckExact(given[0])) {
        PyErr_SetString(PyExc_TypeError, "cut takes bytes and where to begin");
        return NULL;
    }
    Py_ssize_t start = PyLong_AsSsize_t(given[1]), size = PyBytes_GET_SIZE(given[0]);
    if (start < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "no frame begins before the bytes");
        return NULL;
    }
    if (size - start < HEADER_BYTES)
        Py_RETURN_NONE;
    const unsigned char *header = (const unsigned char *)PyBytes_AS_STRING(given[0]) + start;
    uint64_t length = read_number(header + 4, 4), check = read_number(header + 16, 4);
    if (header[0] != version || check != (length ^ 0xFFFFFFFF) || length >= largest_body)
        return PyErr_Format(protocol_error, "no frame at byte %zd: version %d, length %llu", start,
                            header[0], (unsigned long long)length);
    if ((uint64_t)(size - start - HEADER_BYTES) < length)
        Py_RETURN_NONE;
    PyObject *frame = make_frame(header, length);
    return frame == NULL
               ? NULL
               : Py_BuildValue("Nn", frame, start + HEADER_BYTES + (Py_ssize_t)length);
}

static PyObject *prepare(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *parts;
    if (!PyArg_ParseTuple(args, "O!(IK)", &PyDict_Type, &parts, &version, &largest_body)
        || take_parts(parts) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"cut", (PyCFunction)(void (*)(void))cut, METH_FASTCALL,
     "cut(data, start)\n--\n\n(frame, end) of the frame at `start`, None if it is not whole."},
    {"prepare", prepare, METH_VARARGS,
     "prepare(parts, numbers)\n--\n\nGive it the classes and numbers of frames.py; once."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "fedproc.wire._frames",
    .m_doc = "Cutting frames out of a byte stream; see fedproc.wire.frames.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__frames(void) { return PyModule_Create(&definition); }
