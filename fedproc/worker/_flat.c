/* Executing a flat call: a named function on objects of this worker and plain values; and answering
 * what one gives, or with a plain object.
 *
 * What Loop.execute, Host.decode, handlers.call, running.run and ObjectStore.add do, in one step,
 * for the call that pipelines are made of: public objects, the usual modes, a function that writes
 * nothing or that has no object at hand; for questions what handlers.compute, handlers.fetch and
 * leaving.answer do. Any other is theirs: `execute` then has done no more than the frees in front of
 * the command, which may be done twice. What goes wrong in the call, it raises.
 */

/* Objects of the package, given once by fedproc/worker/flat.py. */
#define GIVEN(X) \
    X(loads) X(about) X(usual) X(is_grad_enabled) X(get_default_dtype) X(is_any_autocast_enabled) \
    X(increment_nesting) X(decrement_nesting) X(float32) X(result_domain) X(answer) X(entry_class) \
    X(domain_class) X(tensor_class) X(no_tags) X(no_text) X(wire_up) X(value_slot) X(ids_slot) \
    X(domain_slot) X(tags_slot) X(description_slot) X(open_shape_slot) X(private_slot) \
    X(sources_slot) X(tainted_slot)

/* Objects of a loop. */
#define WIRING(X) X(host) X(store) X(by_id) X(by_object) X(done) X(append)

/* Attributes that it reads. */
#define NAMES(X) \
    X(_last) X(_owner) X(_reported) X(_running) X(_unreported) X(add) X(commands) X(data_ptr) \
    X(free) X(here) X(private) X(registered) X(remove) X(require_process) X(stopped) \
    X(untyped_storage) X(wiring)

#include "../wire/_compiled.h"
#include "../wire/_body.h"
#include "_fields.h"

#include <time.h>

static struct {
    unsigned version, call, compute, fetch, value, keep, plain, frees, report_commands;
    double report_seconds;
} wire;
static PyObject *named_private; /* ("private",): how result_domain is given False */
static PyObject *zero, *known; /* known: name -> what `about` says of it */

typedef struct {
    PyObject *loop, *frame;  /* borrowed */
    PyObject *wiring;
    PyObject *fields;    /* function, arguments, {}, modes, private or folding, places of ids among
                            the arguments; of a fetch: id, whether lent */
    PyObject *args;      /* the arguments with the objects in their places */
    PyObject *used;      /* list of the entries of these objects */
    PyObject *function;
    PyObject *answer;    /* to a fetch */
    int is_pure;
    unsigned kind, flags;
} Call;

static void forget(Call *call)
{
    PyObject *every[] = {call->wiring, call->fields,   call->args,
                         call->used,   call->function, call->answer};
    for (size_t i = 0; i < sizeof every / sizeof *every; i++)
        Py_XDECREF(every[i]);
}

/* ---- the frees in front */

static int free_one(PyObject *objects, uint64_t oid)
{
    int whole = (int)(oid >> 63);
    PyObject *id = PyLong_FromUnsignedLongLong(oid & ~(UINT64_C(1) << 63));
    PyObject *none = id == NULL ? NULL
                                : PyObject_CallMethodOneArg(objects, whole ? s_remove : s_free, id);
    Py_XDECREF(id);
    Py_XDECREF(none);
    return none == NULL ? -1 : 0;
}

/* Do the frees; the length of what says them, -1: an error. See frames.with_frees. */
static Py_ssize_t do_frees(PyObject *objects, PyObject *body)
{
    const unsigned char *bytes = (const unsigned char *)PyBytes_AS_STRING(body);
    Py_ssize_t size = PyBytes_GET_SIZE(body);
    Py_ssize_t count = size < 2 ? 0 : (Py_ssize_t)read_number(bytes, 2), length = 2 + 8 * count;
    if (length > size) {
        PyErr_SetString(PyExc_ValueError, "a message ends within the ids that it frees");
        return -1;
    }
    for (Py_ssize_t at = 2; at < length; at += 8)
        if (free_one(objects, read_number(bytes + at, 8)) < 0)
            return -1;
    return length;
}

/* ---- reading */

/* 1: read, -1: an error. */
static int read_fields(Call *call, PyObject *body)
{
    Py_ssize_t start = call->flags & wire.frees ? do_frees(OF(call, store), body) : 0;
    if (start < 0)
        return -1;
    const char *bytes = PyBytes_AS_STRING(body) + start;
    Py_ssize_t size = PyBytes_GET_SIZE(body) - start;
    call->fields = read_pickle((const unsigned char *)bytes, size);
    if (call->fields == NULL) { /* written by pickle */
        PyObject *pickled = PyBytes_FromStringAndSize(bytes, size);
        call->fields = pickled == NULL ? NULL : PyObject_CallOneArg(loads, pickled);
        Py_XDECREF(pickled);
    }
    return call->fields == NULL ? -1 : 1;
}

/* Whether these are the fields of a flat call or question. */
static int are_flat(PyObject *fields)
{
    return PyTuple_CheckExact(fields) && PyTuple_GET_SIZE(fields) == 6
           && PyUnicode_CheckExact(PyTuple_GET_ITEM(fields, 0))
           && PyTuple_CheckExact(PyTuple_GET_ITEM(fields, 1))
           && PyDict_CheckExact(PyTuple_GET_ITEM(fields, 2))
           && PyDict_GET_SIZE(PyTuple_GET_ITEM(fields, 2)) == 0
           && PyTuple_GET_ITEM(fields, 3) == Py_None && PyTuple_GET_ITEM(fields, 4) == Py_False
           && PyTuple_CheckExact(PyTuple_GET_ITEM(fields, 5));
}

/* Whether an entry is public, with nothing to it that could make it private; -1: an error. */
static int is_public(PyObject *entry)
{
    PyObject *domain = get_slot(domain_slot, entry);
    PyObject *private = domain == NULL ? NULL : get_slot(private_slot, domain);
    PyObject *sources = private == NULL ? NULL : get_slot(sources_slot, domain);
    int public = sources == NULL ? -1 : private == Py_False;
    if (public > 0 && PyObject_IsTrue(sources)) { /* a property: it asks them */
        Py_SETREF(private, PyObject_GetAttr(domain, s_private));
        public = private == NULL ? -1 : private == Py_False;
    }
    Py_XDECREF(domain);
    Py_XDECREF(private);
    Py_XDECREF(sources);
    return public;
}

/* Find the entry of an id, borrowed; 1: done, 0: there is none, or it is not public, -1: an error. */
static int find_entry(Call *call, PyObject *id, PyObject **entry)
{
    *entry = PyDict_GetItemWithError(OF(call, by_id), id);
    if (*entry == NULL || (PyObject *)Py_TYPE(*entry) != entry_class)
        return PyErr_Occurred() ? -1 : 0;
    return is_public(*entry);
}

/* Put the object into the place of its id; 1: done, 0: not usual, -1: an error. */
static int fill(Call *call, PyObject *place)
{
    Py_ssize_t at = PyLong_AsSsize_t(place);
    if (at < 0 || at >= PyTuple_GET_SIZE(call->args))
        return PyErr_Occurred() ? -1 : 0;
    PyObject *entry;
    int found = find_entry(call, PyTuple_GET_ITEM(call->args, at), &entry);
    if (found <= 0)
        return found;
    PyObject *value = get_slot(value_slot, entry);
    if (value == NULL || PyList_Append(call->used, entry) < 0) {
        Py_XDECREF(value);
        return -1;
    }
    Py_DECREF(PyTuple_GET_ITEM(call->args, at));
    PyTuple_SET_ITEM(call->args, at, value);
    return 1;
}

/* The same for all; a tuple of its own, as the one of the fields may be looked at again. */
static int fill_all(Call *call)
{
    PyObject *args = PyTuple_GET_ITEM(call->fields, 1), *places = PyTuple_GET_ITEM(call->fields, 5);
    Py_ssize_t count = PyTuple_GET_SIZE(args);
    call->used = PyList_New(0);
    call->args = PyTuple_New(count);
    if (call->used == NULL || call->args == NULL)
        return -1;
    for (Py_ssize_t i = 0; i < count; i++)
        PyTuple_SET_ITEM(call->args, i, Py_NewRef(PyTuple_GET_ITEM(args, i)));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(places); i++) {
        int done = fill(call, PyTuple_GET_ITEM(places, i));
        if (done <= 0)
            return done;
    }
    return 1;
}

/* ---- running */

/* Find the function; 1: done, 0: left to the general way: arbitrary code with objects at hand, or
 * what is in a class of a user's; -1: an error. */
static int find(Call *call)
{
    PyObject *name = PyTuple_GET_ITEM(call->fields, 0);
    PyObject *told = PyDict_GetItemWithError(known, name);
    if (told == NULL) {
        PyObject *asked = PyErr_Occurred() ? NULL : PyObject_CallOneArg(about, name);
        if (asked == NULL || PyDict_SetItem(known, name, asked) < 0) {
            Py_XDECREF(asked);
            return -1;
        }
        Py_DECREF(asked);
        told = asked; /* the dict holds it */
    }
    PyObject *module, *function;
    if (!PyArg_ParseTuple(told, "pOO", &call->is_pure, &module, &function))
        return -1;
    if ((!call->is_pure && PyList_GET_SIZE(call->used) > 0) || function == Py_None)
        return 0;
    if (module == Py_None) {
        call->function = Py_NewRef(function);
    } else {
        PyObject *loaded = loaded_module(module);
        if (loaded == NULL)
            return PyErr_Occurred() ? -1 : 0;
        call->function = PyObject_GetAttr(loaded, function);
        Py_DECREF(loaded);
    }
    return call->function == NULL ? -1 : 1;
}

/* Whether no context of autocast was left open: see autocast.depth. */
static int is_nowhere_deep(void)
{
    PyObject *more = PyObject_CallNoArgs(increment_nesting);
    PyObject *less = more == NULL ? NULL : PyObject_CallNoArgs(decrement_nesting);
    long depth = less == NULL ? -1 : PyLong_AsLong(less);
    Py_XDECREF(more);
    Py_XDECREF(less);
    return PyErr_Occurred() ? -1 : depth == 0;
}

static int are_modes_usual(void)
{
    int is_usual = gives(is_grad_enabled, Py_True);
    if (is_usual > 0)
        is_usual = gives(get_default_dtype, float32);
    if (is_usual > 0)
        is_usual = gives(is_any_autocast_enabled, Py_False);
    return is_usual > 0 ? is_nowhere_deep() : is_usual;
}

/* The modes are the parent's again after arbitrary code, also where it has raised. */
static PyObject *restored(PyObject *result)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    int is_usual = are_modes_usual();
    if (is_usual < 0)
        PyErr_Clear(); /* usual() meets it again */
    PyObject *none = is_usual > 0 ? Py_NewRef(Py_None) : PyObject_CallNoArgs(usual);
    if (none == NULL) {
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(trace);
        Py_CLEAR(result);
        return NULL;
    }
    Py_DECREF(none);
    PyErr_Restore(type, error, trace);
    return result;
}

/* ---- keeping the result */

static PyObject *public_domain(void)
{
    PyObject *domain = allocate(domain_class, 0), *none = PyTuple_New(0);
    if (domain == NULL || none == NULL || set_slot(private_slot, domain, Py_False) < 0
        || set_slot(tainted_slot, domain, Py_False) < 0 || set_slot(sources_slot, domain, none) < 0)
        Py_CLEAR(domain);
    Py_XDECREF(none);
    return domain;
}

/* Address of a tensor's storage, which views share; 0: none, or an error is set. */
static unsigned long long memory_of(PyObject *tensor)
{
    PyObject *storage = PyObject_CallMethodNoArgs(tensor, s_untyped_storage);
    PyObject *address = storage == NULL ? NULL : PyObject_CallMethodNoArgs(storage, s_data_ptr);
    unsigned long long memory = address == NULL ? 0 : PyLong_AsUnsignedLongLong(address);
    Py_XDECREF(storage);
    Py_XDECREF(address);
    if (address == NULL && PyErr_ExceptionMatches(PyExc_RuntimeError)) /* sparse and the like have no storage */
        PyErr_Clear();
    return memory;
}

/* Whether a result and all that was used are tensors, and none of these shares its memory. */
static int is_apart(Call *call, PyObject *result)
{
    if ((PyObject *)Py_TYPE(result) != tensor_class)
        return 0;
    unsigned long long memory = memory_of(result);
    for (Py_ssize_t i = 0; memory != 0 && i < PyList_GET_SIZE(call->used); i++) {
        PyObject *value = get_slot(value_slot, PyList_GET_ITEM(call->used, i));
        if (value == NULL || (PyObject *)Py_TYPE(value) != tensor_class
            || memory_of(value) == memory || PyErr_Occurred())
            memory = 0;
        Py_XDECREF(value);
    }
    return PyErr_Occurred() ? -1 : memory != 0;
}

/* See privacy.result_domain: nothing that was used is private. */
static PyObject *domain_of(Call *call, PyObject *result)
{
    int is_new = PyList_GET_SIZE(call->used) == 0 ? 1 : is_apart(call, result);
    if (is_new != 0)
        return is_new < 0 ? NULL : public_domain();
    PyObject *arguments[] = {result, call->used, Py_False};
    return PyObject_Vectorcall(result_domain, arguments, 2, named_private);
}

/* Objects without an identity that matters: the same one may be the result of many calls. */
static int is_atom(PyObject *value)
{
    return value == Py_None || PyLong_CheckExact(value) || PyFloat_CheckExact(value)
           || PyBool_Check(value) || PyUnicode_CheckExact(value) || PyBytes_CheckExact(value);
}

static PyObject *make_entry(PyObject *value, PyObject *id, PyObject *domain)
{
    PyObject *entry = allocate(entry_class, 0), *ids = PyList_New(1);
    if (ids != NULL)
        PyList_SET_ITEM(ids, 0, Py_NewRef(id));
    if (entry == NULL || ids == NULL || set_slot(value_slot, entry, value) < 0
        || set_slot(ids_slot, entry, ids) < 0 || set_slot(domain_slot, entry, domain) < 0
        || set_slot(tags_slot, entry, no_tags) < 0 || set_slot(description_slot, entry, no_text) < 0
        || set_slot(open_shape_slot, entry, Py_True) < 0)
        Py_CLEAR(entry);
    Py_XDECREF(ids);
    return entry;
}

/* See ObjectStore.add: 1: kept, 0: it was here before, so that is its business, -1: an error. */
static int keep_new(Call *call, PyObject *id, PyObject *value, PyObject *domain)
{
    PyObject *entry = make_entry(value, id, domain), *key = NULL;
    int done = entry == NULL ? -1 : 1;
    if (done > 0 && !is_atom(value)) {
        key = PyLong_FromVoidPtr(value);
        int known = key == NULL ? -1 : PyDict_Contains(OF(call, by_object), key);
        done = known < 0 ? -1 : !known;
        if (done > 0 && PyDict_SetItem(OF(call, by_object), key, entry) < 0)
            done = -1;
    }
    if (done > 0 && PyDict_SetItem(OF(call, by_id), id, entry) < 0)
        done = -1;
    Py_XDECREF(entry);
    Py_XDECREF(key);
    return done;
}

static int keep(Call *call, PyObject *id, PyObject *value)
{
    PyObject *domain = domain_of(call, value);
    if (domain == NULL)
        return -1;
    int done = 0;
    if (is_atom(value) || (PyObject *)Py_TYPE(value) == tensor_class)
        done = keep_new(call, id, value, domain);
    if (done == 0) {
        PyObject *entry = PyObject_CallMethodObjArgs(OF(call, store), s_add, id, value, domain, NULL);
        done = entry == NULL ? -1 : 1;
        Py_XDECREF(entry);
    }
    Py_DECREF(domain);
    return done;
}

/* ---- answering */

/* The answer with a plain value, and the ids that it has, if they are asked for; a new reference.
 * NULL without an error: it is not plain, or there is no room here. See leaving.answer. */
static PyObject *make_answer(Call *call, PyObject *value, PyObject *ids)
{
    Body body;
    Py_ssize_t count = ids == NULL ? 0 : PyList_GET_SIZE(ids);
    int is_written = begin_pickle(&body) && put_number(&body, 'K', wire.plain, 1)
                     && put_plain(&body, value) && (ids == NULL || begin_tuple(&body, count));
    for (Py_ssize_t i = 0; is_written && i < count; i++)
        is_written = put_int(&body, PyList_GET_ITEM(ids, i));
    if (is_written && ids != NULL)
        is_written = end_tuple(&body, count);
    if (!is_written || !end_tuple(&body, ids == NULL ? 2 : 3) || !end_tuple(&body, 1)
        || !end_pickle(&body))
        return NULL;
    PyObject *frame = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(HEADER_BYTES + body.used));
    if (frame != NULL) {
        unsigned char *at = (unsigned char *)PyBytes_AS_STRING(frame);
        uint64_t number = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(call->frame, 2));
        write_header(at, wire.version, wire.value, wire.plain, number, body.used);
        memcpy(at + HEADER_BYTES, body.bytes, body.used);
    }
    return frame;
}

/* Find the object that is fetched, and answer with it; 1: done, 0: it is not plain, or not public,
 * or is to be lent, -1: an error. */
static int find_object(Call *call)
{
    PyObject *fields = call->fields, *entry;
    if (!PyTuple_CheckExact(fields) || PyTuple_GET_SIZE(fields) != 2
        || PyTuple_GET_ITEM(fields, 1) != Py_False)
        return 0;
    int found = find_entry(call, PyTuple_GET_ITEM(fields, 0), &entry);
    if (found <= 0)
        return found;
    PyObject *value = get_slot(value_slot, entry), *ids = get_slot(ids_slot, entry);
    if (value != NULL && ids != NULL)
        call->answer = make_answer(call, value, ids);
    Py_XDECREF(value);
    Py_XDECREF(ids);
    return call->answer != NULL ? 1 : PyErr_Occurred() ? -1 : 0;
}

/* The answer is on its way, and with it is told how far this loop is. */
static int note_answered(Call *call)
{
    return PyObject_SetAttr(call->loop, s__running, Py_None) < 0
                   || PyObject_SetAttr(call->loop, s__reported, PyTuple_GET_ITEM(call->frame, 2)) < 0
               ? -1
               : PyObject_SetAttr(call->loop, s__unreported, zero);
}

/* ---- the call */

/* 1: this loop executes such frames, 0: it does not, or not this one, -1: an error. */
static int begin(Call *call)
{
    int is_usual = find_wiring(call->loop, &call->wiring);
    if (is_usual > 0) {
        PyObject *last = PyObject_GetAttr(call->loop, s__last);
        is_usual = last == NULL ? -1
                                : PyObject_RichCompareBool(PyTuple_GET_ITEM(call->frame, 2), last,
                                                           Py_GT);
        Py_XDECREF(last);
    }
    if (is_usual > 0)
        is_usual = is_attribute(OF(call, host), s_registered, Py_None);
    if (is_usual > 0)
        is_usual = is_attribute(OF(call, host), s_stopped, Py_False);
    return is_usual;
}

/* Note that the call runs, so that a signal handler that raises in it is told of as its error:
 * how many commands are to be reported with it, -1: an error. */
static long long note_begin(Call *call)
{
    return PyObject_SetAttr(call->loop, s__running, call->frame) < 0
                   || PyObject_SetAttr(call->loop, s__last, PyTuple_GET_ITEM(call->frame, 2)) < 0
                   || add_one(OF(call, host), s_commands) < 0
               ? -1
               : add_one(call->loop, s__unreported);
}

/* Note that it is done: in memory that the parent sees, also if the worker is killed. */
static int note_end(Call *call)
{
    int noted = PyObject_SetAttr(call->loop, s__running, Py_None);
    return noted < 0 ? noted : PyObject_SetItem(OF(call, done), zero, PyTuple_GET_ITEM(call->frame, 2));
}

/* End a copy of the worker that the call has forked. */
static int require_process(Call *call)
{
    int is_worker = are_equal(OF(call, host), s__owner, s_here);
    if (is_worker != 0)
        return is_worker;
    PyObject *none = PyObject_CallMethodOneArg(OF(call, host), s_require_process, Py_None);
    Py_XDECREF(none);
    return none == NULL ? -1 : 1;
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* What the function gives. A signal that came meanwhile is handled in here: where its handler raises
 * later, the result is kept or answered already. */
static PyObject *call_function(Call *call)
{
    PyObject *result = PyObject_Call(call->function, call->args, NULL);
    if (result != NULL && PyErr_CheckSignals() < 0)
        Py_CLEAR(result);
    return call->is_pure ? result : restored(result);
}

/* Call the function and keep what it gives: whether the parent should be told now; -1: an error. */
static int run_call(Call *call)
{
    double started = seconds();
    long long unreported = note_begin(call);
    if (unreported < 0)
        return -1;
    PyObject *result = call_function(call);
    int done = result == NULL ? -1 : 1;
    if (done > 0 && call->flags & wire.keep)
        done = keep(call, PyTuple_GET_ITEM(call->frame, 2), result);
    Py_XDECREF(result);
    if (done < 0 || require_process(call) < 0 || note_end(call) < 0)
        return -1;
    return unreported >= (long long)wire.report_commands
           || seconds() - started > wire.report_seconds;
}

/* Call the function and answer with what it gives; -1: an error. */
static int run_question(Call *call)
{
    if (note_begin(call) < 0)
        return -1;
    PyObject *result = call_function(call);
    PyObject *frame = result == NULL ? NULL : make_answer(call, result, NULL), *none = NULL;
    if (frame != NULL)
        none = PyObject_CallOneArg(OF(call, append), frame);
    else if (result != NULL && !PyErr_Occurred())
        none = PyObject_CallFunctionObjArgs(answer, OF(call, host),
                                            PyTuple_GET_ITEM(call->frame, 2), result, NULL);
    Py_XDECREF(result);
    Py_XDECREF(frame);
    Py_XDECREF(none);
    return none == NULL || require_process(call) < 0 ? -1 : note_answered(call);
}

/* Answer with an object, which is in the answer already; -1: an error. */
static int run_fetch(Call *call)
{
    if (note_begin(call) < 0)
        return -1;
    PyObject *none = PyObject_CallOneArg(OF(call, append), call->answer);
    Py_XDECREF(none);
    return none == NULL ? -1 : note_answered(call);
}

/* Whether the parent should be told now; -1: an error. */
static int run(Call *call)
{
    if (call->kind == wire.call)
        return run_call(call);
    int done = call->kind == wire.fetch ? run_fetch(call) : run_question(call);
    return done < 0 ? -1 : 1;
}

/* What went wrong before it was called is told of as its error, too. */
static void note_failed(Call *call)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    if (note_begin(call) < 0)
        PyErr_Clear();
    PyErr_Restore(type, error, trace);
}

/* Find all that a command refers to; 1: done, 0: it is not flat, or not usual, -1: an error. */
static int understand(Call *call)
{
    if (call->kind == wire.fetch)
        return find_object(call);
    int is_flat = are_flat(call->fields);
    if (is_flat)
        is_flat = fill_all(call);
    return is_flat > 0 ? find(call) : is_flat;
}

PyDoc_STRVAR(execute_doc,
"execute(loop, frame)\n--\n\n"
"Execute the command in a frame if it is a flat call or question: None if not, else whether to "
"report.");

static PyObject *execute(PyObject *Py_UNUSED(module), PyObject *const *given, Py_ssize_t count)
{
    if (count != 2 || !PyTuple_Check(given[1]) || PyTuple_GET_SIZE(given[1]) != 4
        || !PyBytes_CheckExact(PyTuple_GET_ITEM(given[1], 3))) {
        PyErr_SetString(PyExc_TypeError, "execute takes a loop and a frame");
        return NULL;
    }
    Call call = {.loop = given[0], .frame = given[1]};
    call.kind = (unsigned)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(call.frame, 0));
    call.flags = (unsigned)PyLong_AsUnsignedLong(PyTuple_GET_ITEM(call.frame, 1));
    int is_flat = (call.kind == wire.call || call.kind == wire.compute || call.kind == wire.fetch)
                  && (call.flags | wire.keep | wire.frees) == (wire.plain | wire.keep | wire.frees);
    if (is_flat)
        is_flat = begin(&call);
    int has_begun = is_flat > 0;
    if (is_flat > 0)
        is_flat = read_fields(&call, PyTuple_GET_ITEM(call.frame, 3));
    if (is_flat > 0)
        is_flat = understand(&call);
    if (is_flat < 0 && has_begun)
        note_failed(&call);
    int done = is_flat > 0 ? run(&call) : is_flat;
    forget(&call);
    if (done < 0)
        return NULL;
    return is_flat ? PyBool_FromLong(done) : Py_NewRef(Py_None);
}

PyDoc_STRVAR(prepare_doc,
"prepare(parts, numbers)\n--\n\n"
"Give it the parts of the package that it works with, and numbers of the wire and loop; once.");

static PyObject *prepare(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *parts;
    if (!PyArg_ParseTuple(args, "O!(IIIIIIIIId)", &PyDict_Type, &parts, &wire.version, &wire.call,
                          &wire.compute, &wire.fetch, &wire.value, &wire.keep, &wire.plain,
                          &wire.frees, &wire.report_commands, &wire.report_seconds))
        return NULL;
    if (take_parts(parts) < 0)
        return NULL;
    named_private = PyTuple_Pack(1, s_private);
    zero = PyLong_FromLong(0);
    known = PyDict_New();
    if (named_private == NULL || zero == NULL || known == NULL)
        return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"execute", (PyCFunction)(void (*)(void))execute, METH_FASTCALL, execute_doc},
    {"prepare", prepare, METH_VARARGS, prepare_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "fedproc.worker._flat",
    .m_doc = "Executing flat calls in one step; see fedproc.worker.flat.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__flat(void) { return PyModule_Create(&definition); }
