/* Read golden vectors from a .safetensors file, as specified in golden-vectors.md.
 *
 *     gcc -std=c99 -o read_golden read_golden.c -lm
 *     ./read_golden FILE
 *
 * recomputes one linear layer from the arrays in the file and prints the largest difference.
 * Exit status: 0 if it is rounding; 1 if it is not, or if the file cannot be read (one line).
 */
#include <ctype.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char *header; unsigned char *data; size_t size; } File;
typedef struct { int rank; size_t shape[4], count; double epsilon, *values; } Array;

static void fail(const char *where, const char *what) {
    fprintf(stderr, "read_golden: %s: %s\n", where, what);
    exit(1);
}

/* An unsigned little-endian integer, on a machine of any byte order. */
static uint64_t integer_at(const unsigned char *bytes, size_t size) {
    return size ? integer_at(bytes + 1, size - 1) << 8 | bytes[0] : 0;
}

static File open_file(const char *path) {
    FILE *stream = fopen(path, "rb");
    if (!stream || fseek(stream, 0, SEEK_END)) fail(path, "cannot be opened");
    long end = ftell(stream);
    if (end < 8) fail(path, "truncated before the header");
    rewind(stream);
    unsigned char *bytes = malloc((size_t)end);
    if (!bytes || fread(bytes, 1, (size_t)end, stream) != (size_t)end) fail(path, "unreadable");
    fclose(stream);
    uint64_t length = integer_at(bytes, 8);
    if (length > (uint64_t)end - 8) fail(path, "truncated in the header");
    char *header = calloc((size_t)length + 1, 1); /* ends with a 0 byte */
    if (!header) fail(path, "too large");
    memcpy(header, bytes + 8, (size_t)length);
    return (File){header, bytes + 8 + length, (size_t)end - 8 - (size_t)length};
}

static const char *skip_space(const char *s) { return s + strspn(s, " \t\r\n"); }

static const char *skip_string(const char *s) { /* from one quote to behind the other */
    for (s++; *s && *s != '"'; s++)
        if (*s == '\\' && s[1]) s++;
    return *s ? s + 1 : s;
}

static const char *skip_value(const char *s) { /* to the comma or bracket behind it */
    for (int depth = 0; *s && (depth > 0 || !strchr(",]}", *s));) {
        depth += (*s == '[' || *s == '{') - (*s == ']' || *s == '}');
        s = *s == '"' ? skip_string(s) : s + 1;
    }
    return s;
}

/* The value of a member of a JSON object, or an empty string. */
static const char *member(const char *object, const char *name) {
    size_t length = strlen(name);
    for (const char *s = skip_space(object); *s == '{' || *s == ',';) {
        const char *key = skip_space(s + 1);
        if (*key != '"') break;
        const char *behind = skip_string(key);
        if (*(s = skip_space(behind)) != ':') break;
        s = skip_space(s + 1);
        if ((size_t)(behind - key) == length + 2 && !memcmp(key + 1, name, length)) return s;
        s = skip_value(s);
    }
    return "";
}

/* Read a JSON list of integers; return how many there are, or -1. */
static int integers(const char *s, size_t *out, int most) {
    char *behind;
    for (int n = 0; *s == '[' || *s == ','; n++) {
        s = skip_space(s + 1);
        if (n == 0 && *s == ']') return 0;
        if (n == most || !isdigit((unsigned char)*s)) return -1;
        out[n] = (size_t)strtoull(s, &behind, 10);
        if (*(s = skip_space(behind)) == ']') return n + 1;
    }
    return -1;
}

/* The array of that name, its numbers as doubles, row-major. */
static Array find(const File *file, const char *name) {
    Array array = {.count = 1};
    size_t range[2] = {0, 0};
    const char *entry = member(file->header, name), *dtype = member(entry, "dtype");
    int is_double = !strncmp(dtype, "\"F64\"", 5), is_single = !strncmp(dtype, "\"F32\"", 5);
    size_t size = is_double || !strncmp(dtype, "\"I64\"", 5) ? 8 : is_single ? 4 : 1;
    if (!*entry) fail(name, "no such array");
    if (size == 1 && strncmp(dtype, "\"BOOL\"", 6)) fail(name, "unknown dtype");
    array.rank = integers(member(entry, "shape"), array.shape, 4);
    if (array.rank < 0 || integers(member(entry, "data_offsets"), range, 2) != 2)
        fail(name, "garbled entry in the header");
    if (range[0] > range[1] || range[1] > file->size) fail(name, "truncated in the data");
    for (int i = 0; i < array.rank; array.count *= array.shape[i++])
        if (!array.shape[i] || array.count > file->size / array.shape[i]) fail(name, "bad shape");
    if (range[1] - range[0] != array.count * size) fail(name, "shape contradicts data_offsets");
    if (!(array.values = malloc(array.count * sizeof(double)))) fail(name, "too large");
    array.epsilon = is_single ? FLT_EPSILON : DBL_EPSILON;
    for (size_t i = 0; i < array.count; i++) {
        uint64_t bits = integer_at(file->data + range[0] + i * size, size);
        uint32_t low = (uint32_t)bits;
        float single;
        memcpy(&single, &low, 4);
        if (is_double) memcpy(&array.values[i], &bits, 8);
        else array.values[i] = is_single ? single : (double)(int64_t)bits;
    }
    return array;
}

int main(int count, char **words) {
    if (count != 2) fail("usage", "read_golden FILE");
    File file = open_file(words[1]);
    Array x = find(&file, "activations/blocks.0.attention_norm");    /* [batch, length, dim] */
    Array w = find(&file, "params/blocks.0.attention.query.kernel"); /* [in, out] */
    Array b = find(&file, "params/blocks.0.attention.query.bias");   /* [out] */
    Array q = find(&file, "activations/blocks.0.attention.query");   /* by head, see page */
    if (x.rank != 3 || w.rank != 2 || b.rank != 1 || q.rank != 4) fail(words[1], "other ranks");
    size_t length = q.shape[2], head_dim = q.shape[3], dim = q.shape[1] * head_dim;
    if (x.shape[0] != q.shape[0] || x.shape[1] != length || x.shape[2] != dim
        || w.shape[0] != dim || w.shape[1] != dim || b.shape[0] != dim)
        fail(words[1], "shapes do not fit");

    double largest = 0;
    int wrong = 0;
    for (size_t row = 0; row < x.count / dim; row++)
        for (size_t out = 0; out < dim; out++) { /* y = x w + b, head by head */
            double y = b.values[out], magnitude = fabs(y), product;
            for (size_t in = 0; in < dim; in++, y += product, magnitude += fabs(product))
                product = x.values[row * dim + in] * w.values[in * dim + out];
            size_t head = row / length * q.shape[1] + out / head_dim; /* of all sequences */
            size_t place = (head * length + row % length) * head_dim + out % head_dim;
            double difference = fabs(y - q.values[place]);
            largest = fmax(largest, isnan(difference) ? INFINITY : difference);
            wrong |= !(difference <= (double)(dim + 2) * q.epsilon * magnitude); /* or NaN */
        }
    printf("activations/blocks.0.attention.query: %zu numbers, largest difference %.1e, %s\n",
           q.count, largest, wrong ? "MORE THAN ROUNDING" : "rounding");
    return wrong;
}
