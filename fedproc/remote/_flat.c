/* Submitting a flat call: a named function on pointers and plain values, under the usual modes; and
 * asking for what one gives, or for an object.
 *
 * What run_there (calls.py), _flat (encode.py), Outbox.send (outbox.py) and owned (making.py) do,
 * in one step, for the call that pipelines are made of; for questions what Link.submit and lend
 * (lending.py) do. Whatever is not usual about one, its arguments, the modes of torch or the state
 * of the link, is theirs: None is returned then, and nothing has changed. A test compares the two
 * ways, message by message.
 *
 * All that can run code of Python comes first: making objects can start the collector, and that
 * a finalizer. From `commit` on nothing does, so no thread and no signal handler sees a call that
 * was sent by half: the interpreter lets them in between instructions of Python only.
 */

/* Objects of the package, given once by fedproc/remote/flat.py. */
#define GIVEN(X) \
    X(pointer_types) X(handle_class) X(site_class) X(wire_up) X(handle_slot) X(owner_slot) \
    X(chain_slot) X(kept_names) X(known_files) X(is_ours) X(get_frame) X(is_grad_enabled) \
    X(is_any_autocast_enabled) X(get_default_dtype) X(float32)

/* Objects of a link, some of them methods. */
#define WIRING(X) \
    X(outbox) X(inbox) X(hub) X(acquire) X(release) X(held) X(trash) X(popleft) X(expected) \
    X(expect) X(borrows) X(reading) X(numbers) X(handles) X(frames) X(append) X(is_silent)

/* Attributes that it reads. */
#define NAMES(X) \
    X(_among) X(_handle) X(end) X(executed) X(f_lasti) X(flush) X(gone) X(here) X(last) X(link) \
    X(lockstep) X(may_wait) X(number) X(oid) X(owner) X(query) X(sending) X(submitted) X(tail) \
    X(wiring) X(writes)

#include "../wire/_compiled.h"
#include "../wire/_body.h"

#include <frameobject.h> /* until Python 3.11 not part of Python.h */

#define MOST_ARGUMENTS 16

static struct {
    unsigned version, call, compute, fetch, keep, plain, frees, most_frees, most_unanswered, burst;
} wire;
static PyObject *one, *nothing; /* nothing: () */
static PyObject *last_site;     /* of the call before: a loop issues all of its calls at one */

/* ---- the body */

/* The id of a pointer's object. `link` is where the call runs, NULL: nowhere yet; a new reference.
 * 1: written, 0: gone, or elsewhere, or no pointer, -1: an error. */
static int put_pointer(Body *body, PyObject *value, PyObject **link)
{
    int is_pointer = PySet_Contains(pointer_types, (PyObject *)Py_TYPE(value));
    if (is_pointer <= 0)
        return is_pointer;
    PyObject *handle = PyObject_GetAttr(value, s__handle); /* of an attribute: a property */
    if (handle == NULL)
        return -1;
    PyObject *gone = PyObject_GetAttr(handle, s_gone);
    PyObject *there = PyObject_GetAttr(handle, s_link);
    PyObject *oid = PyObject_GetAttr(handle, s_oid);
    int done = -1;
    if (gone != NULL && there != NULL && oid != NULL) {
        done = gone == Py_None && (*link == NULL || *link == there) && PyLong_CheckExact(oid)
               && put_int(body, oid);
        if (done && *link == NULL)
            *link = Py_NewRef(there);
    }
    Py_DECREF(handle);
    Py_XDECREF(gone);
    Py_XDECREF(there);
    Py_XDECREF(oid);
    return done;
}

/* 1: the body is written, 0: this is not a flat call, -1: an error. */
static int write_body(Body *body, PyObject *function, PyObject *args, PyObject *private,
                      PyObject **link)
{
    Py_ssize_t count = PyTuple_GET_SIZE(args), pointers = 0;
    unsigned char places[MOST_ARGUMENTS];
    if (count > MOST_ARGUMENTS || !begin_pickle(body) || !put_code(body, '(')
        || !put_text(body, function) || !begin_tuple(body, count))
        return 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *arg = PyTuple_GET_ITEM(args, i);
        if (put_plain(body, arg))
            continue;
        int done = put_pointer(body, arg, link);
        if (done <= 0)
            return done;
        places[pointers++] = (unsigned char)i;
    }
    if (!end_tuple(body, count) || !put(body, "}N", 2) || !put_plain(body, private)
        || !begin_tuple(body, pointers))
        return 0;
    for (Py_ssize_t i = 0; i < pointers; i++)
        if (!put_number(body, 'K', places[i], 1))
            return 0;
    return end_tuple(body, pointers) && put_code(body, 't') && end_pickle(body);
}

/* ---- what is asked before */

/* Whether nothing but the usual modes would travel with the call: see context.modes. */
static int are_modes_usual(void)
{
    int usual = gives(is_grad_enabled, Py_True);
    if (usual > 0)
        usual = gives(is_any_autocast_enabled, Py_False);
    return usual > 0 ? gives(get_default_dtype, float32) : usual;
}

/* ---- the call */

typedef struct {
    unsigned kind, flags;
    PyObject *name, *what;  /* of the function */
    PyObject *link, *wiring;
    PyObject *expected;  /* what the inbox is told: number, site, what */
    PyObject *handle, *pointer; /* of the result, NULL: a question has none */
    PyObject *borrow;    /* of a question whose answer may lie in the worker's memory, or NULL */
    PyObject *reference; /* weak, to the handle or the borrow */
    PyObject *number;
    PyObject *asked;     /* list that is told link and number of a question, or NULL; borrowed */
    int writes;
    int was_idle;        /* the worker had nothing to do */
    Py_ssize_t dropped;  /* pointers whose ids go in front */
    Py_ssize_t waiting;  /* frames that are to be written, with this one */
} Call;

static void forget(Call *call)
{
    PyObject *every[] = {call->name,    call->what,    call->link,   call->wiring,    call->expected,
                         call->handle,  call->pointer, call->borrow, call->reference, call->number};
    for (size_t i = 0; i < sizeof every / sizeof *every; i++)
        Py_XDECREF(every[i]);
}

/* Find the name that a function travels by, and what it is called, if both are known and still so:
 * see code.kept_name. 1: done, 0: not known, -1: an error. */
static int find_name(Call *call, PyObject *function, PyObject *what)
{
    if (PyUnicode_CheckExact(function) && what != Py_None) {
        call->name = Py_NewRef(function);
        call->what = Py_NewRef(what);
        return 1;
    }
    if (!PyFunction_Check(function) && !PyCFunction_CheckExact(function))
        return 0;
    PyObject *kept = PyDict_GetItemWithError(kept_names, function);
    if (kept == NULL)
        return PyErr_Occurred() ? -1 : 0;
    PyObject *names = PyTuple_GET_ITEM(kept, 2); /* kept: module, attribute, (name, what) */
    call->name = Py_NewRef(PyTuple_GET_ITEM(names, 0));
    call->what = Py_NewRef(PyTuple_GET_ITEM(names, 1));
    PyObject *loaded = loaded_module(PyTuple_GET_ITEM(kept, 0));
    if (loaded == NULL)
        return PyErr_Occurred() ? -1 : 0;
    PyObject *found = PyObject_GetAttr(loaded, PyTuple_GET_ITEM(kept, 1));
    Py_DECREF(loaded);
    Py_XDECREF(found);
    if (found == NULL) { /* it is called so no more */
        if (!PyErr_ExceptionMatches(PyExc_AttributeError))
            return -1;
        PyErr_Clear();
    }
    return found == function;
}

/* The instruction that a frame is at, NULL: an error. The end of the one before may be the end of
 * its code, of which others may have asked to be told, and they may call: hence a local name. */
static PyObject *site_of(PyFrameObject *frame, PyCodeObject *code)
{
    PyObject *at = PyObject_GetAttr((PyObject *)frame, s_f_lasti), *site = NULL;
    if (at == NULL)
        return NULL;
    if (last_site != NULL && PyTuple_GET_ITEM(last_site, 0) == (PyObject *)code
        && PyLong_AsLong(PyTuple_GET_ITEM(last_site, 1)) == PyLong_AsLong(at)) {
        site = Py_NewRef(last_site);
    } else if ((site = allocate_tuple(site_class, 2)) != NULL) {
        PyTuple_SET_ITEM(site, 0, Py_NewRef((PyObject *)code));
        PyTuple_SET_ITEM(site, 1, Py_NewRef(at));
        Py_XSETREF(last_site, Py_NewRef(site));
    }
    Py_DECREF(at);
    return site;
}

/* The place in the user's code: see site.caller. NULL without an error: none. */
static PyObject *caller(void)
{
    PyFrameObject *frame = (PyFrameObject *)PyObject_CallOneArg(get_frame, one);
    if (frame == NULL && PyErr_ExceptionMatches(PyExc_ValueError))
        PyErr_Clear(); /* a method of ours is all that a thread runs */
    PyObject *site = NULL;
    while (frame != NULL) {
        PyCodeObject *code = PyFrame_GetCode(frame);
        PyObject *ours = PyDict_GetItemWithError(known_files, code->co_filename);
        ours = ours != NULL ? Py_NewRef(ours)
               : PyErr_Occurred() ? NULL
                                  : PyObject_CallOneArg(is_ours, code->co_filename);
        if (ours == Py_False)
            site = site_of(frame, code);
        PyFrameObject *back = ours == Py_True ? PyFrame_GetBack(frame) : NULL;
        Py_XDECREF(ours);
        Py_DECREF(code);
        Py_SETREF(frame, back);
    }
    return site;
}

/* Make what any command needs; 1: done, 0: not usual, -1: an error. */
static int make(Call *call)
{
    int is_wired = find_wiring(call->link, &call->wiring);
    PyObject *site = is_wired > 0 ? caller() : NULL;
    if (site == NULL)
        return PyErr_Occurred() ? -1 : 0;
    call->expected = PyTuple_Pack(3, Py_None, site, call->what);
    Py_DECREF(site);
    if (call->expected == NULL)
        return -1;
    PyObject_GC_UnTrack(call->expected); /* numbers, text and code: it can be in no cycle */
    return 1;
}

/* Make what holds the result of a call. */
static int make_pointer(Call *call, PyObject *cls)
{
    /* not allocate(): until Python 3.12 it would have a dict of its own */
    call->handle = PyBaseObject_Type.tp_new((PyTypeObject *)handle_class, nothing, NULL);
    call->reference = call->handle == NULL ? NULL : PyWeakref_NewRef(call->handle, NULL);
    call->pointer = allocate(cls, 0);
    if (call->reference == NULL || call->pointer == NULL
        || PyObject_SetAttr(call->handle, s_link, call->link) < 0
        || set_slot(handle_slot, call->pointer, call->handle) < 0
        || set_slot(chain_slot, call->pointer, Py_None) < 0)
        return -1;
    return 1;
}

/* Whether nothing is held back, refused or waited for in this state of the link; -1: an error. */
static int is_link_usual(Call *call)
{
    PyObject *lockstep = PyObject_GetAttr(call->link, s_lockstep);
    if (lockstep == NULL)
        return -1;
    int usual = PyFloat_CheckExact(lockstep) && PyFloat_AS_DOUBLE(lockstep) == 0.0;
    Py_DECREF(lockstep);
    if (usual)
        usual = is_attribute(call->link, s_end, Py_None);
    if (usual > 0)
        usual = are_equal(call->link, s_owner, s_here);
    if (usual > 0)
        usual = is_attribute(OF(call, outbox), s_sending, Py_False);
    if (usual <= 0)
        return usual;
    call->dropped = PyObject_Size(OF(call, trash));
    return PyObject_Size(OF(call, held)) == 0
           && (!call->writes || PyDict_GET_SIZE(OF(call, reading)) == 0)
           && call->dropped <= (Py_ssize_t)wire.most_frees
           && PyObject_Size(OF(call, expected)) < (Py_ssize_t)wire.most_unanswered;
}

/* Take the lock of the outbox if nobody else has it. */
static int take(Call *call)
{
    PyObject *taken = PyObject_CallOneArg(OF(call, acquire), Py_False);
    Py_XDECREF(taken);
    return taken == NULL ? -1 : taken == Py_True;
}

/* Let go of it, also with an error under way: gives `done`, -1 where it could not be let go. */
static int let_go(Call *call, int done)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyObject *none = PyObject_CallNoArgs(OF(call, release));
    Py_XDECREF(none);
    if (done < 0)
        PyErr_Restore(type, error, trace);
    return none == NULL ? -1 : done;
}

/* ---- commit: from here on nothing runs code of Python */

/* The ids of dropped pointers go in front: taken out of the trash, and of the handles. */
static int write_frees(Call *call, unsigned char *at, Py_ssize_t count)
{
    PyObject *handles = OF(call, handles);
    int done = 0;
    write_number(at, (uint64_t)count, 2);
    for (at += 2; count > 0 && done == 0; count--, at += 8) {
        PyObject *oid = PyObject_CallNoArgs(OF(call, popleft));
        if (oid == NULL) {
            done = -1;
            break;
        }
        write_number(at, PyLong_AsUnsignedLongLong(oid), 8);
        int known = PyDict_Contains(handles, oid);
        if (known < 0 || (known && PyDict_DelItem(handles, oid) < 0) || PyErr_Occurred())
            done = -1;
        Py_DECREF(oid);
    }
    return done;
}

/* See frames.py. */
static PyObject *make_frame(Call *call, const Body *body)
{
    Py_ssize_t dropped = call->dropped;
    size_t frees = dropped ? 2 + 8 * (size_t)dropped : 0, length = frees + body->used;
    PyObject *frame = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(HEADER_BYTES + length));
    if (frame == NULL)
        return NULL;
    unsigned char *at = (unsigned char *)PyBytes_AS_STRING(frame);
    write_header(at, wire.version, call->kind, call->flags | (dropped ? wire.frees : 0),
                 PyLong_AsUnsignedLongLong(call->number), length);
    if (dropped && write_frees(call, at + HEADER_BYTES, dropped) < 0)
        Py_CLEAR(frame);
    else
        memcpy(at + HEADER_BYTES + frees, body->bytes, body->used);
    return frame;
}

/* See Channel.append. */
static int queue(Call *call, PyObject *frame)
{
    PyObject *none = PyObject_CallOneArg(OF(call, append), frame);
    call->waiting = PyObject_Size(OF(call, frames));
    Py_XDECREF(none);
    return none == NULL ? -1 : 0;
}

/* Tell whoever has to know of the command, by its number. */
static int note(Call *call)
{
    Py_DECREF(PyTuple_GET_ITEM(call->expected, 0)); /* None */
    PyTuple_SET_ITEM(call->expected, 0, Py_NewRef(call->number));
    PyObject *none = PyObject_CallOneArg(OF(call, expect), call->expected);
    Py_XDECREF(none);
    if (none == NULL)
        return -1;
    if (call->handle != NULL)
        return PyObject_SetAttr(call->handle, s_oid, call->number) < 0
                       || PyObject_SetAttr(call->handle, s_number, call->number) < 0
                   ? -1
                   : PyDict_SetItem(OF(call, handles), call->number, call->reference);
    return 0;
}

/* Tell who asked: a signal handler may raise as soon as this step is done. */
static int note_asked(Call *call)
{
    return PyList_Append(call->asked, call->link) < 0 ? -1 : PyList_Append(call->asked, call->number);
}

/* What is asked for is read from now on: see Borrows.begin. */
static int note_borrow(Call *call)
{
    return PyObject_SetAttr(call->borrow, s_query, call->number) < 0
                   || PyObject_SetAttr(call->borrow, s__among, OF(call, borrows)) < 0
               ? -1
               : PyDict_SetItem(OF(call, reading), call->number, call->reference);
}

static int commit(Call *call, const Body *body)
{
    PyObject *outbox = OF(call, outbox), *frame = NULL;
    PyObject *executed = PyObject_GetAttr(OF(call, inbox), s_executed);
    PyObject *last = PyObject_GetAttr(outbox, s_last);
    int done = -1;
    call->number = PyIter_Next(OF(call, numbers));
    if (call->number != NULL && executed != NULL && last != NULL
        && (call->was_idle = PyObject_RichCompareBool(executed, last, Py_GE)) >= 0
        && (frame = make_frame(call, body)) != NULL
        && (!call->writes || add_one(outbox, s_writes) >= 0)
        && note(call) == 0 && add_one(outbox, s_submitted) >= 0 && queue(call, frame) == 0
        && PyObject_SetAttr(outbox, s_last, call->number) == 0
        && (call->asked == NULL || note_asked(call) == 0)
        && (call->borrow == NULL || note_borrow(call) == 0))
        done = call->pointer == NULL ? 0 : set_slot(owner_slot, call->pointer, Py_True);
    Py_XDECREF(frame);
    Py_XDECREF(executed);
    Py_XDECREF(last);
    return done;
}

/* ---- and afterwards */

/* All that comes before it is sent, of a named function; 1: done, 0: not usual, -1: an error. */
static int prepare_function(Call *call, Body *body, PyObject *args, PyObject *private)
{
    int done = PyTuple_CheckExact(args); /* torch passes on what it was given */
    if (done > 0)
        done = are_modes_usual();
    if (done > 0)
        done = write_body(body, call->name, args, private, &call->link);
    if (done > 0 && call->link == NULL)
        done = 0;
    return done > 0 ? make(call) : done;
}

/* 1: sent, 0: not usual, -1: an error. */
static int send(Call *call, const Body *body)
{
    int done = take(call);
    if (done <= 0)
        return done;
    done = is_link_usual(call);
    if (done > 0 && commit(call, body) < 0)
        done = -1;
    return let_go(call, done);
}

/* Tell the janitor, if nobody has: see Hub.tail. */
static int ring(Call *call)
{
    PyObject *silent = PyObject_CallNoArgs(OF(call, is_silent));
    PyObject *told = silent != Py_True ? Py_XNewRef(silent)
                                       : PyObject_CallMethodNoArgs(OF(call, hub), s_tail);
    Py_XDECREF(silent);
    Py_XDECREF(told);
    return told == NULL ? -1 : 0;
}

/* Write what waits, or leave it to the janitor: see Link.submit. */
static int follow(Call *call)
{
    int may_wait = !call->was_idle && call->waiting < (Py_ssize_t)wire.burst;
    PyObject *told;
    if (may_wait && call->waiting == 1) {
        if ((told = PyObject_CallMethodOneArg(OF(call, outbox), s_may_wait, one)) == NULL)
            return -1;
        may_wait = told == Py_True;
        Py_DECREF(told);
    }
    if (may_wait)
        return ring(call); /* also behind others: the end of a borrow waits without having rung */
    told = PyObject_CallMethodNoArgs(call->link, s_flush);
    Py_XDECREF(told);
    return told == NULL ? -1 : 0;
}

PyDoc_STRVAR(submit_doc,
"submit(cls, link, function, args, what, writes, private)\n--\n\n"
"Submit a flat call: a pointer of class `cls`, or None: it is none, or things are not as usual.\n"
"`function` is a name, and `what` how a user calls it, or a function, and None.");

static PyObject *submit(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    if (count != 7 || !PyType_Check(given[0])) {
        PyErr_SetString(PyExc_TypeError, "submit takes what its signature says");
        return NULL;
    }
    Body body;
    Call call = {.kind = wire.call, .flags = wire.keep | wire.plain,
                 .link = given[1] == Py_None ? NULL : Py_NewRef(given[1]),
                 .writes = PyObject_IsTrue(given[5])};
    int done = find_name(&call, given[2], given[4]);
    if (done > 0)
        done = prepare_function(&call, &body, given[3], given[6]);
    if (done > 0)
        done = make_pointer(&call, given[0]);
    if (done > 0)
        done = send(&call, &body);
    if (done > 0)
        done = follow(&call) < 0 ? -1 : 1;
    PyObject *result = done < 0 ? NULL : Py_NewRef(done ? call.pointer : Py_None);
    forget(&call);
    return result;
}

/* ---- questions: whoever asks writes what waits */

PyDoc_STRVAR(ask_doc,
"ask(function, args, what, asked)\n--\n\n"
"Ask what a named function gives: whether it was asked; `asked` is told link and number then.");

static PyObject *ask(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    if (count != 4 || !PyUnicode_CheckExact(given[0]) || !PyList_CheckExact(given[3])) {
        PyErr_SetString(PyExc_TypeError, "ask takes what its signature says");
        return NULL;
    }
    Body body;
    Call call = {.kind = wire.compute, .flags = wire.plain, .name = Py_NewRef(given[0]),
                 .what = Py_NewRef(given[2]), .asked = given[3]};
    int done = prepare_function(&call, &body, given[1], Py_False);
    if (done > 0)
        done = send(&call, &body);
    forget(&call);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

PyDoc_STRVAR(fetch_doc,
"fetch(link, oid, what, borrow)\n--\n\n"
"Ask for an object, which `borrow` reads from then on: whether it was asked for.");

static PyObject *fetch(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    if (count != 4 || !PyLong_CheckExact(given[1])) {
        PyErr_SetString(PyExc_TypeError, "fetch takes what its signature says");
        return NULL;
    }
    Body body;
    Call call = {.kind = wire.fetch, .flags = wire.plain, .link = Py_NewRef(given[0]),
                 .what = Py_NewRef(given[2]), .borrow = Py_NewRef(given[3])};
    int done = begin_pickle(&body) && put_int(&body, given[1]) && put_plain(&body, Py_False)
               && end_tuple(&body, 2) && end_pickle(&body);
    if (done > 0)
        done = make(&call);
    if (done > 0 && (call.reference = PyWeakref_NewRef(call.borrow, NULL)) == NULL)
        done = -1;
    if (done > 0)
        done = send(&call, &body);
    forget(&call);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

PyDoc_STRVAR(prepare_doc,
"prepare(parts, numbers)\n--\n\n"
"Give it the parts of the package that it works with, and numbers of the wire; once.");

static PyObject *prepare(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *parts;
    if (!PyArg_ParseTuple(args, "O!(IIIIIIIIII)", &PyDict_Type, &parts, &wire.version, &wire.call,
                          &wire.compute, &wire.fetch, &wire.keep, &wire.plain, &wire.frees,
                          &wire.most_frees, &wire.most_unanswered, &wire.burst))
        return NULL;
    one = PyLong_FromLong(1);
    nothing = PyTuple_New(0);
    if (one == NULL || nothing == NULL || take_parts(parts) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"ask", (PyCFunction)(void (*)(void))ask, METH_FASTCALL, ask_doc},
    {"fetch", (PyCFunction)(void (*)(void))fetch, METH_FASTCALL, fetch_doc},
    {"prepare", prepare, METH_VARARGS, prepare_doc},
    {"submit", (PyCFunction)(void (*)(void))submit, METH_FASTCALL, submit_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "fedproc.remote._flat",
    .m_doc = "Submitting flat calls in one step; see fedproc.remote.flat.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__flat(void) { return PyModule_Create(&definition); }
