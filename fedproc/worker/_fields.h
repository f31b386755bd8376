/* The fields of a flat call, read without an unpickler: what wire/_body.h writes, and no more.
 * A pickle with anything else in it is left to pickle: then NULL is returned without an error. */

#ifndef FEDPROC_FIELDS_H
#define FEDPROC_FIELDS_H

#include <string.h>

#define MOST_FIELDS 64

typedef struct {
    const unsigned char *at, *end;
    PyObject *items[MOST_FIELDS]; /* read, and in no tuple yet */
    int count;
    int marks[4], marked;         /* where longer tuples begin */
} Reader;

static int push(Reader *reader, PyObject *item)
{
    if (item == NULL || reader->count == MOST_FIELDS) {
        Py_XDECREF(item);
        return 0;
    }
    reader->items[reader->count++] = item;
    return 1;
}

/* So many bytes, or NULL: there are fewer. */
static const unsigned char *next_bytes(Reader *reader, size_t count)
{
    if (count > (size_t)(reader->end - reader->at))
        return NULL;
    reader->at += count;
    return reader->at - count;
}

/* The items from `start` on as a tuple; those before a mark are in none that begins after it. */
static int push_tuple(Reader *reader, int start)
{
    int count = reader->count - start;
    int least = reader->marked > 0 ? reader->marks[reader->marked - 1] : 0;
    PyObject *tuple = start < least ? NULL : PyTuple_New(count);
    if (tuple == NULL)
        return 0;
    for (int i = 0; i < count; i++)
        PyTuple_SET_ITEM(tuple, i, reader->items[start + i]);
    reader->count = start;
    return push(reader, tuple);
}

static int push_int(Reader *reader, int count)
{
    const unsigned char *bytes = next_bytes(reader, (size_t)count);
    if (bytes == NULL)
        return 0;
    uint64_t value = read_number(bytes, count);
    return push(reader, PyLong_FromLongLong(count == 4 ? (int32_t)value : (int64_t)value));
}

static int push_float(Reader *reader)
{
    const unsigned char *bytes = next_bytes(reader, 8);
    uint64_t bits = 0;
    double value;
    if (bytes == NULL)
        return 0;
    for (int i = 0; i < 8; i++) /* the most significant byte first */
        bits = bits << 8 | bytes[i];
    memcpy(&value, &bits, sizeof value);
    return push(reader, PyFloat_FromDouble(value));
}

static int push_short(Reader *reader, int is_text)
{
    const unsigned char *length = next_bytes(reader, 1);
    const char *bytes = length == NULL ? NULL : (const char *)next_bytes(reader, *length);
    if (bytes == NULL)
        return 0;
    return push(reader, is_text ? PyUnicode_DecodeUTF8(bytes, *length, "surrogatepass")
                                : PyBytes_FromStringAndSize(bytes, *length));
}

/* One instruction; 0: not one of ours. */
static int step(Reader *reader, unsigned char code)
{
    const unsigned char *length;
    switch (code) {
    case 'K': return push_int(reader, 1);
    case 'M': return push_int(reader, 2);
    case 'J': return push_int(reader, 4);
    case 0x8a: return (length = next_bytes(reader, 1)) != NULL && *length == 8 && push_int(reader, 8);
    case 'G': return push_float(reader);
    case 0x8c: return push_short(reader, 1);
    case 'C': return push_short(reader, 0);
    case 'N': return push(reader, Py_NewRef(Py_None));
    case 0x88: return push(reader, Py_NewRef(Py_True));
    case 0x89: return push(reader, Py_NewRef(Py_False));
    case '}': return push(reader, PyDict_New());
    case ')': return push_tuple(reader, reader->count);
    case 0x85: return push_tuple(reader, reader->count - 1);
    case 0x86: return push_tuple(reader, reader->count - 2);
    case 0x87: return push_tuple(reader, reader->count - 3);
    case '(':
        if (reader->marked == sizeof reader->marks / sizeof *reader->marks)
            return 0;
        reader->marks[reader->marked++] = reader->count;
        return 1;
    case 't': return reader->marked > 0 && push_tuple(reader, reader->marks[--reader->marked]);
    default: return 0;
    }
}

/* A new reference; NULL without an error: this is for pickle. */
static PyObject *read_pickle(const unsigned char *bytes, Py_ssize_t size)
{
    Reader reader = {.at = bytes, .end = bytes + size};
    const unsigned char *start = next_bytes(&reader, 2), *code = NULL;
    int goes_on = start != NULL && start[0] == 0x80 && start[1] == 5;
    while (goes_on && (code = next_bytes(&reader, 1)) != NULL && *code != '.')
        goes_on = step(&reader, *code);
    int is_whole = goes_on && code != NULL && reader.at == reader.end;
    PyObject *read = is_whole && reader.count == 1 && reader.marked == 0 ? reader.items[--reader.count]
                                                                         : NULL;
    while (reader.count > 0)
        Py_DECREF(reader.items[--reader.count]);
    if (read == NULL)
        PyErr_Clear(); /* pickle meets it again */
    return read;
}

#endif
