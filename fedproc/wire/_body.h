/* Small messages: the pickle, protocol 5, of plain values and tuples of them, written without a
 * pickler, which costs more than all the rest of a call; and the header in front of it. What it has
 * no room or no code for is left to pickle: then 0 is returned. */

#ifndef FEDPROC_BODY_H
#define FEDPROC_BODY_H

#include <string.h>

#define MOST_BODY_BYTES 1024

typedef struct {
    unsigned char bytes[MOST_BODY_BYTES];
    size_t used;
} Body;

#define HEADER_BYTES 20

/* See frames.py. */
static void write_header(unsigned char *at, unsigned version, unsigned kind, unsigned flags,
                         uint64_t number, size_t length)
{
    at[0] = (unsigned char)version;
    at[1] = (unsigned char)kind;
    write_number(at + 2, flags, 2);
    write_number(at + 4, length, 4);
    write_number(at + 8, number, 8);
    write_number(at + 16, length ^ 0xFFFFFFFF, 4);
}

/* Room for more, or 0: it becomes a message that is not written here. */
static unsigned char *room(Body *body, size_t count)
{
    if (count > sizeof body->bytes - body->used)
        return NULL;
    unsigned char *at = body->bytes + body->used;
    body->used += count;
    return at;
}

static int put(Body *body, const void *bytes, size_t count)
{
    unsigned char *at = room(body, count);
    return at != NULL && memcpy(at, bytes, count) != NULL;
}

static int put_code(Body *body, unsigned char code) { return put(body, &code, 1); }

static int put_number(Body *body, unsigned char code, uint64_t value, int count)
{
    unsigned char *at = room(body, 1 + (size_t)count);
    if (at == NULL)
        return 0;
    at[0] = code;
    write_number(at + 1, value, count);
    return 1;
}

static int put_int(Body *body, PyObject *number)
{
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow)
        return 0;
    if (value >= 0 && value < 256)
        return put_number(body, 'K', (uint64_t)value, 1);
    if (value >= INT32_MIN && value <= INT32_MAX)
        return put_number(body, 'J', (uint64_t)value, 4);
    return put_code(body, 0x8a) && put_number(body, 8, (uint64_t)value, 8); /* 8 bytes follow */
}

static int put_float(Body *body, PyObject *number)
{
    double value = PyFloat_AS_DOUBLE(number);
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    unsigned char *at = room(body, 9);
    if (at == NULL)
        return 0;
    at[0] = 'G';
    for (int i = 0; i < 8; i++) /* this one with the most significant byte first */
        at[1 + i] = (unsigned char)(bits >> (56 - 8 * i));
    return 1;
}

static int put_short(Body *body, unsigned char code, const char *bytes, Py_ssize_t count)
{
    return count < 256 && put_number(body, code, (uint64_t)count, 1)
           && put(body, bytes, (size_t)count);
}

static int put_text(Body *body, PyObject *text)
{
    Py_ssize_t count;
    const char *bytes = PyUnicode_AsUTF8AndSize(text, &count);
    if (bytes == NULL) { /* surrogates without a partner; pickle knows how */
        PyErr_Clear();
        return 0;
    }
    return put_short(body, 0x8c, bytes, count);
}

/* What ends a tuple of so many items; the longer ones begin with a mark. */
static int end_tuple(Body *body, Py_ssize_t count)
{
    static const char codes[] = {')', '\x85', '\x86', '\x87', 't'};
    return put_code(body, (unsigned char)codes[count < 4 ? count : 4]);
}

static int begin_tuple(Body *body, Py_ssize_t count) { return count < 4 || put_code(body, '('); }

static int begin_pickle(Body *body)
{
    body->used = 0;
    return put(body, "\x80\x05", 2);
}

static int end_pickle(Body *body) { return put_code(body, '.'); }

/* 1: written, 0: not one of these. */
static int put_plain(Body *body, PyObject *value)
{
    if (PyLong_CheckExact(value))
        return put_int(body, value);
    if (PyFloat_CheckExact(value))
        return put_float(body, value);
    if (value == Py_None)
        return put_code(body, 'N');
    if (PyBool_Check(value))
        return put_code(body, value == Py_True ? 0x88 : 0x89);
    if (PyUnicode_CheckExact(value))
        return put_text(body, value);
    if (PyBytes_CheckExact(value))
        return put_short(body, 'C', PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value));
    return 0;
}

#endif
