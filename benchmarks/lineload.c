/* lineload - a load generator for servers that answer each line with one line.
 *
 * Build:  cc -O2 -Wall -Wextra -o lineload lineload.c
 * Usage:  lineload -p PORT [options]
 *
 *   -p PORT     TCP port on 127.0.0.1
 *   -c COUNT    connections, or callers with -o (default 1)
 *   -d DEPTH    requests in flight on each connection (default 1)
 *   -t SECONDS  how long to measure (default 3)
 *   -w SECONDS  how long to run before that, unmeasured (default 0.5)
 *   -n COUNT    end after COUNT requests: no warm-up, -t is then the upper bound
 *   -l LINE     the request, without its newline (default {"function":"echo","args":[1,2]})
 *   -e TEXT     a reply in which TEXT does not occur counts as an error
 *   -o          one connection per request: connect, send, read the reply, close
 *   -u PATH     speak WebSocket (RFC 6455), at that path: LINE and each reply are a text message.
 *               Not with -o; pings are not answered
 *   -s COUNT    with -o, rotate over 127.0.1.1 ... 127.0.1.COUNT as source addresses, so that
 *               connections in TIME_WAIT do not use up the ports of one address (default 64)
 *
 * Matching replies to requests.  Replies are taken in the order of the requests, unless LINE holds
 * the placeholder %ID%.  It is then replaced by a number below DEPTH that no other request in
 * flight on that connection has, and each reply is matched by its "id", so that a server may answer
 * in any order.
 *
 * One thread, one epoll set, nothing blocks but epoll_wait, and the run ends when its time is over
 * even if the server never answers.  The result is one JSON object on stdout:
 *
 *   requests   answered while measuring         seconds    measured
 *   rate       requests per second              p50_us ... max_us    latency, within 1 %
 *   errors     lost connections, requests that found none, wrong replies; the warm-up included
 *   cpu_share  of one core, used by this program: near 1.0 it measures itself, not the server
 *
 * Latency runs from the moment at which a request is queued for the kernel (with -o: from before
 * connect()) to the moment at which its reply has been read.
 *
 * Exit status: 0 all well, 1 there were errors or no reply came, 2 it could not run.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PLACEHOLDER "%ID%"
#define ID_KEY "\"id\":"
#define NS_PER_SECOND 1000000000ull
#define FIRST_SOURCE 0x7f000101u /* 127.0.1.1 */

enum {
    TEXT_FRAME = 0x81, /* the first byte of a text message in one frame */
    EVENTS_PER_WAIT = 256,
    INPUT_BYTES = 1 << 16, /* a longer reply is an error */
    MAX_FRAME_HEAD = 8,    /* of what is sent: 65535 bytes at most, masked */
    MAX_ERRORS = 10000,    /* give up: the server is gone */
    MAX_SOURCES = 254,
};

/* ---- time ------------------------------------------------------------------------------------ */

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_SECOND + (uint64_t)now.tv_nsec;
}

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec)
           + (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

/* ---- latency histogram -----------------------------------------------------------------------
 *
 * A value keeps its highest 8 bits: exact below 256 ns, and above that 128 buckets for each power
 * of two, which is a resolution better than 1 %.
 */

enum { STEPS = 128, MAX_SHIFT = 64 - 8, BUCKETS = (MAX_SHIFT + 2) * STEPS };

struct histogram {
    uint64_t buckets[BUCKETS];
    uint64_t count;
    uint64_t max;
};

static void histogram_add(struct histogram *histogram, uint64_t value)
{
    int bits = 64 - __builtin_clzll(value | 1);
    int shift = bits > 8 ? bits - 8 : 0;
    histogram->buckets[(uint64_t)shift * STEPS + (value >> shift)]++;
    histogram->count++;
    if (value > histogram->max)
        histogram->max = value;
}

static double histogram_bucket_middle(int bucket)
{
    if (bucket < 2 * STEPS)
        return bucket;
    int shift = bucket / STEPS - 1;
    uint64_t start = (uint64_t)(bucket - shift * STEPS) << shift;
    return (double)start + (double)(1ull << shift) / 2;
}

static double histogram_quantile(const struct histogram *histogram, double quantile)
{
    double wanted = quantile * (double)histogram->count;
    uint64_t seen = 0;
    for (int bucket = 0; bucket < BUCKETS; bucket++) {
        seen += histogram->buckets[bucket];
        if (seen > 0 && (double)seen >= wanted) {
            double middle = histogram_bucket_middle(bucket);
            return middle < (double)histogram->max ? middle : (double)histogram->max;
        }
    }
    return 0;
}

/* ---- the run --------------------------------------------------------------------------------- */

struct options {
    int port, connections, depth, sources;
    double seconds, warm_up;
    uint64_t limit; /* 0: none */
    const char *line, *expect, *path; /* path: of a WebSocket, or NULL */
    bool reconnect;
};

/* What a slot sends: the request line with its newline, the slot's number in place of %ID%; or the
 * frame that holds it. */
struct request {
    char *text;
    size_t size;
};

/* Each connection has DEPTH slots; a request in flight occupies one.  With ids, any free slot is
 * taken, from a stack.  Without, they are taken and given back in turn, like a ring. */
struct connection {
    int fd; /* -1: closed */
    bool wants_write;
    bool is_ready; /* requests may be sent: for a WebSocket, the handshake is over */
    int in_flight;
    uint64_t *sent_at; /* by slot; 0: free */
    int *free_slots;   /* with ids */
    int next_slot, oldest_slot; /* without */
    char *output;
    size_t output_start, output_end;
    char input[INPUT_BYTES];
    size_t input_size;
};

struct load {
    struct options options;
    bool with_ids;
    struct request *requests; /* by slot */
    struct request handshake; /* of a WebSocket */
    size_t output_bytes;
    struct connection *connections;
    int epoll;
    int open_connections;
    unsigned next_source;
    uint64_t sent, in_flight, errors;

    bool measuring;
    uint64_t measured_from, answered;
    double cpu_from;
    struct histogram latency;
};

static void die(const char *what)
{
    fprintf(stderr, "lineload: %s: %s\n", what, strerror(errno));
    exit(2);
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        die("memory");
    return memory;
}

static bool may_send(const struct load *load)
{
    return load->options.limit == 0 || load->sent < load->options.limit;
}

static int take_slot(const struct load *load, struct connection *conn)
{
    if (load->with_ids)
        return conn->free_slots[load->options.depth - ++conn->in_flight];
    int slot = conn->next_slot;
    conn->next_slot = (slot + 1) % load->options.depth;
    conn->in_flight++;
    return slot;
}

static void give_slot_back(const struct load *load, struct connection *conn, int slot)
{
    conn->sent_at[slot] = 0;
    if (load->with_ids)
        conn->free_slots[load->options.depth - conn->in_flight] = slot;
    else
        conn->oldest_slot = (slot + 1) % load->options.depth;
    conn->in_flight--;
}

/* Return the slot that a reply belongs to, or -1 if there is none. */
static int slot_of_reply(const struct load *load, const struct connection *conn, const char *reply,
                         size_t size)
{
    if (!load->with_ids)
        return conn->in_flight > 0 ? conn->oldest_slot : -1;
    const char *end = reply + size;
    const char *digit = memmem(reply, size, ID_KEY, strlen(ID_KEY));
    if (!digit)
        return -1;
    digit += strlen(ID_KEY);
    while (digit < end && *digit == ' ')
        digit++;
    if (digit == end || *digit < '0' || *digit > '9')
        return -1;
    int slot = 0;
    for (; digit < end && *digit >= '0' && *digit <= '9'; digit++) {
        slot = slot * 10 + (*digit - '0');
        if (slot >= load->options.depth)
            return -1;
    }
    return conn->sent_at[slot] ? slot : -1;
}

/* ---- one connection -------------------------------------------------------------------------- */

static void watch(const struct load *load, struct connection *conn, int operation, bool wants_write)
{
    struct epoll_event event = {.events = EPOLLIN | (wants_write ? EPOLLOUT : 0), .data.ptr = conn};
    if (epoll_ctl(load->epoll, operation, conn->fd, &event) < 0)
        die("epoll_ctl");
    conn->wants_write = wants_write;
}

/* Close a connection and forget what was in flight on it. */
static void close_connection(struct load *load, struct connection *conn)
{
    close(conn->fd);
    conn->fd = -1;
    load->open_connections--;
    load->in_flight -= (uint64_t)conn->in_flight;
    memset(conn->sent_at, 0, (size_t)load->options.depth * sizeof *conn->sent_at);
    for (int slot = 0; slot < load->options.depth; slot++)
        conn->free_slots[slot] = slot;
    conn->in_flight = conn->next_slot = conn->oldest_slot = 0;
    conn->output_start = conn->output_end = conn->input_size = 0;
}

static void lose_connection(struct load *load, struct connection *conn)
{
    load->errors++;
    close_connection(load, conn);
}

/* Queue requests until the connection's depth is reached. */
static void fill(struct load *load, struct connection *conn, uint64_t now)
{
    while (conn->is_ready && conn->in_flight < load->options.depth && may_send(load)) {
        int slot = take_slot(load, conn);
        const struct request *request = &load->requests[slot];
        if (conn->output_end + request->size > load->output_bytes) {
            /* What is unsent is in flight, so there is room for it and this request. */
            conn->output_end -= conn->output_start;
            memmove(conn->output, conn->output + conn->output_start, conn->output_end);
            conn->output_start = 0;
        }
        memcpy(conn->output + conn->output_end, request->text, request->size);
        conn->output_end += request->size;
        conn->sent_at[slot] = now;
        load->in_flight++;
        load->sent++;
    }
}

/* Send what is queued, as far as the kernel takes it. */
static void flush(struct load *load, struct connection *conn)
{
    while (conn->output_start < conn->output_end) {
        ssize_t size = send(conn->fd, conn->output + conn->output_start,
                            conn->output_end - conn->output_start, MSG_NOSIGNAL);
        if (size < 0 && errno == EAGAIN) {
            if (!conn->wants_write)
                watch(load, conn, EPOLL_CTL_MOD, true);
            return;
        }
        if (size < 0) {
            lose_connection(load, conn);
            return;
        }
        conn->output_start += (size_t)size;
    }
    conn->output_start = conn->output_end = 0;
    if (conn->wants_write)
        watch(load, conn, EPOLL_CTL_MOD, false);
}

static void bind_source(struct load *load, int fd)
{
    const int on = 1;
    unsigned turn = load->next_source++ % (unsigned)load->options.sources;
    struct sockaddr_in source = {.sin_family = AF_INET,
                                 .sin_addr.s_addr = htonl(FIRST_SOURCE + turn)};
    /* The port is chosen in connect(), where only the pair of both ends must be unused. */
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&source, sizeof source) < 0)
        die("bind to a loopback source address");
}

/* Connect without waiting for it, and send the first requests. */
static void open_connection(struct load *load, struct connection *conn)
{
    const int on = 1;
    struct sockaddr_in server = {.sin_family = AF_INET,
                                 .sin_port = htons((uint16_t)load->options.port),
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    uint64_t now = now_ns();
    conn->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (conn->fd < 0)
        die("socket");
    load->open_connections++;
    setsockopt(conn->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (load->options.reconnect)
        bind_source(load, conn->fd);
    if (connect(conn->fd, (struct sockaddr *)&server, sizeof server) < 0 && errno != EINPROGRESS) {
        load->sent += load->options.reconnect; /* the request that found no connection */
        lose_connection(load, conn);
        return;
    }
    watch(load, conn, EPOLL_CTL_ADD, false);
    conn->is_ready = !load->options.path;
    if (!conn->is_ready) {
        memcpy(conn->output, load->handshake.text, load->handshake.size);
        conn->output_end = load->handshake.size;
    }
    fill(load, conn, now);
    flush(load, conn); /* over loopback the handshake is over by now; else EPOLLOUT will tell */
}

static void take_reply(struct load *load, struct connection *conn, const char *reply, size_t size,
                       uint64_t now)
{
    const char *expect = load->options.expect;
    int slot = slot_of_reply(load, conn, reply, size);
    if (slot < 0) {
        load->errors++;
        return;
    }
    if (expect && !memmem(reply, size, expect, strlen(expect)))
        load->errors++;
    if (load->measuring) {
        load->answered++;
        histogram_add(&load->latency, now - conn->sent_at[slot]);
    }
    load->in_flight--;
    give_slot_back(load, conn, slot);
}

/* Find the first reply in the input; return where what follows it begins, or NULL if it is not
 * complete.  A frame that is no text, or is none of its own, is given as an empty reply. */
static const char *next_reply(const struct load *load, const char *input, const char *end,
                              const char **reply, size_t *size)
{
    const unsigned char *head = (const unsigned char *)input;
    *reply = input;
    if (!load->options.path) {
        const char *newline = memchr(input, '\n', (size_t)(end - input));
        *size = newline ? (size_t)(newline - input) : 0;
        return newline ? newline + 1 : NULL;
    }
    if (end - input < 2 || (head[1] == 126 && end - input < 4))
        return NULL;
    *reply += head[1] == 126 ? 4 : 2;
    *size = head[1] == 126 ? (size_t)head[2] << 8 | head[3] : head[1];
    if (head[1] > 126 || *size > (size_t)(end - *reply)) /* longer than the buffer, or to come */
        return NULL;
    const char *next = *reply + *size;
    if (head[0] != TEXT_FRAME)
        *size = 0;
    return next;
}

/* Take the answer to a WebSocket's handshake out of the input, once it is complete. */
static void take_handshake(struct load *load, struct connection *conn)
{
    const char *end = memmem(conn->input, conn->input_size, "\r\n\r\n", 4);
    if (!end)
        return;
    if (conn->input_size < 12 || memcmp(conn->input, "HTTP/1.1 101", 12) != 0) {
        lose_connection(load, conn);
        return;
    }
    end += 4;
    conn->input_size -= (size_t)(end - conn->input);
    memmove(conn->input, end, conn->input_size);
    conn->is_ready = true;
}

/* Take every complete reply out of the input; return how many there were. */
static int take_replies(struct load *load, struct connection *conn, uint64_t now)
{
    const char *start = conn->input, *end = conn->input + conn->input_size, *reply, *next;
    size_t size;
    int count = 0;
    while ((next = next_reply(load, start, end, &reply, &size))) {
        if (size > 0 || !load->options.path) {
            take_reply(load, conn, reply, size, now);
            count++;
        }
        start = next;
    }
    conn->input_size = (size_t)(end - start);
    memmove(conn->input, start, conn->input_size);
    return count;
}

static void receive(struct load *load, struct connection *conn)
{
    ssize_t size = recv(conn->fd, conn->input + conn->input_size,
                        INPUT_BYTES - conn->input_size, 0);
    if (size < 0 && errno == EAGAIN)
        return;
    if (size <= 0) { /* closed, broken, or a reply that fills the whole buffer */
        lose_connection(load, conn);
        return;
    }
    uint64_t now = now_ns();
    conn->input_size += (size_t)size;
    if (!conn->is_ready)
        take_handshake(load, conn);
    if (!conn->is_ready)
        return;
    int replies = take_replies(load, conn, now);
    if (load->options.reconnect) {
        if (replies > 0)
            close_connection(load, conn);
        return;
    }
    fill(load, conn, now);
    flush(load, conn);
}

static void handle(struct load *load, struct connection *conn, uint32_t events)
{
    if (events & EPOLLOUT)
        flush(load, conn);
    if (conn->fd >= 0 && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)))
        receive(load, conn);
    if (conn->fd < 0 && load->options.reconnect && may_send(load))
        open_connection(load, conn);
}

/* ---- start, middle, end ---------------------------------------------------------------------- */

/* Put a request, without its newline, into a WebSocket's frame. */
static void put_in_frame(struct request *request)
{
    static const unsigned char mask[4] = {0x37, 0xfa, 0x21, 0x3d};
    size_t size = request->size - 1, head = 2;
    unsigned char *frame = allocate(size + MAX_FRAME_HEAD, 1);
    frame[0] = TEXT_FRAME;
    frame[1] = (unsigned char)(0x80 | (size < 126 ? size : 126));
    if (size >= 126) {
        frame[head++] = (unsigned char)(size >> 8);
        frame[head++] = (unsigned char)size;
    }
    memcpy(frame + head, mask, sizeof mask);
    head += sizeof mask;
    for (size_t i = 0; i < size; i++)
        frame[head + i] = (unsigned char)request->text[i] ^ mask[i % sizeof mask];
    free(request->text);
    *request = (struct request){.text = (char *)frame, .size = head + size};
}

static void prepare_handshake(struct load *load)
{
    int port = load->options.port;
    int size = asprintf(&load->handshake.text,
                        "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nOrigin: http://127.0.0.1:%d\r\n"
                        "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                        "Sec-WebSocket-Version: 13\r\n\r\n",
                        load->options.path, port, port);
    if (size < 0)
        die("memory");
    load->handshake.size = (size_t)size;
}

/* Write down, once for all, what each slot sends. */
static void prepare_requests(struct load *load)
{
    const char *line = load->options.line;
    const char *placeholder = strstr(line, PLACEHOLDER);
    size_t longest = 0;
    load->with_ids = placeholder != NULL;
    load->requests = allocate((size_t)load->options.depth, sizeof *load->requests);
    for (int slot = 0; slot < load->options.depth; slot++) {
        struct request *request = &load->requests[slot];
        int size;
        if (placeholder)
            size = asprintf(&request->text, "%.*s%d%s\n", (int)(placeholder - line), line, slot,
                            placeholder + strlen(PLACEHOLDER));
        else
            size = asprintf(&request->text, "%s\n", line);
        if (size < 0)
            die("memory");
        request->size = (size_t)size;
        if (load->options.path)
            put_in_frame(request);
        if (request->size > longest)
            longest = request->size;
    }
    load->output_bytes = longest * (size_t)load->options.depth;
    if (load->options.path)
        prepare_handshake(load);
    if (load->output_bytes < load->handshake.size)
        load->output_bytes = load->handshake.size;
}

static void prepare_connections(struct load *load)
{
    size_t depth = (size_t)load->options.depth;
    load->connections = allocate((size_t)load->options.connections, sizeof *load->connections);
    for (int i = 0; i < load->options.connections; i++) {
        struct connection *conn = &load->connections[i];
        conn->fd = -1;
        conn->sent_at = allocate(depth, sizeof *conn->sent_at);
        conn->free_slots = allocate(depth, sizeof *conn->free_slots);
        for (int slot = 0; slot < load->options.depth; slot++)
            conn->free_slots[slot] = slot;
        conn->output = allocate(load->output_bytes, 1);
    }
}

static void begin_measuring(struct load *load, uint64_t now)
{
    load->measuring = true;
    load->measured_from = now;
    load->cpu_from = cpu_seconds();
}

/* Is there nothing left to wait for? */
static bool is_over(const struct load *load)
{
    if (load->errors >= MAX_ERRORS)
        return true;
    if (!may_send(load) && load->in_flight == 0)
        return true;
    return load->open_connections == 0 && !load->options.reconnect;
}

static int milliseconds_until(uint64_t deadline, uint64_t now)
{
    return (int)((deadline - now) / 1000000) + 1;
}

static void run(struct load *load)
{
    struct epoll_event events[EVENTS_PER_WAIT];
    uint64_t now = now_ns();
    uint64_t measure_at = now + (uint64_t)(load->options.warm_up * 1e9);
    uint64_t stop_at = measure_at + (uint64_t)(load->options.seconds * 1e9);

    if (load->options.warm_up == 0)
        begin_measuring(load, now);
    for (int i = 0; i < load->options.connections && may_send(load); i++)
        open_connection(load, &load->connections[i]);
    while (!is_over(load) && (now = now_ns()) < stop_at) {
        if (!load->measuring && now >= measure_at)
            begin_measuring(load, now);
        int count = epoll_wait(load->epoll, events, EVENTS_PER_WAIT,
                               milliseconds_until(load->measuring ? stop_at : measure_at, now));
        if (count < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < count; i++)
            handle(load, events[i].data.ptr, events[i].events);
        if (load->options.reconnect) /* callers that could not even begin to connect try again */
            for (int i = 0; i < load->options.connections && may_send(load); i++)
                if (load->connections[i].fd < 0)
                    open_connection(load, &load->connections[i]);
    }
}

static void print_result(const struct load *load)
{
    const struct histogram *latency = &load->latency;
    double seconds = load->measuring ? (double)(now_ns() - load->measured_from) / 1e9 : 0;
    double cpu = load->measuring ? cpu_seconds() - load->cpu_from : 0;
    printf("{\"requests\": %llu, \"seconds\": %.6f, \"rate\": %.1f, \"p50_us\": %.2f,"
           " \"p99_us\": %.2f, \"p999_us\": %.2f, \"max_us\": %.2f,"
           " \"errors\": %llu, \"cpu_share\": %.3f}\n",
           (unsigned long long)load->answered, seconds,
           seconds > 0 ? (double)load->answered / seconds : 0,
           histogram_quantile(latency, 0.5) / 1e3, histogram_quantile(latency, 0.99) / 1e3,
           histogram_quantile(latency, 0.999) / 1e3, (double)latency->max / 1e3,
           (unsigned long long)load->errors, seconds > 0 ? cpu / seconds : 0);
}

/* ---- command line ---------------------------------------------------------------------------- */

static void refuse(const char *why)
{
    fprintf(stderr, "lineload: %s; the top of lineload.c lists the options\n", why);
    exit(2);
}

static double number(const char *text, double low, double high)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= low && value <= high))
        refuse("a number is missing or out of range");
    return value;
}

static struct options parse_options(int argc, char **argv)
{
    struct options options = {.connections = 1,
                              .depth = 1,
                              .sources = 64,
                              .seconds = 3,
                              .warm_up = 0.5,
                              .line = "{\"function\":\"echo\",\"args\":[1,2]}"};
    int letter;
    while ((letter = getopt(argc, argv, "p:c:d:t:w:n:l:e:os:u:")) != -1) {
        switch (letter) {
        case 'p': options.port = (int)number(optarg, 1, 65535); break;
        case 'c': options.connections = (int)number(optarg, 1, 100000); break;
        case 'd': options.depth = (int)number(optarg, 1, 100000); break;
        case 't': options.seconds = number(optarg, 0.001, 3600); break;
        case 'w': options.warm_up = number(optarg, 0, 3600); break;
        case 'n': options.limit = (uint64_t)number(optarg, 1, 1e15); break;
        case 'l': options.line = optarg; break;
        case 'e': options.expect = optarg; break;
        case 'o': options.reconnect = true; break;
        case 'u': options.path = optarg; break;
        case 's': options.sources = (int)number(optarg, 1, MAX_SOURCES); break;
        default: refuse("unknown option");
        }
    }
    if (options.port == 0 || optind < argc)
        refuse("-p PORT is needed, and nothing but options");
    if (options.path && (options.reconnect || strlen(options.line) > 65000))
        refuse("-u goes neither with -o nor with a LINE of more than 65000 bytes");
    if (options.reconnect)
        options.depth = 1;
    if (options.limit > 0)
        options.warm_up = 0;
    return options;
}

int main(int argc, char **argv)
{
    static struct load load;
    load.options = parse_options(argc, argv);
    load.epoll = epoll_create1(EPOLL_CLOEXEC);
    if (load.epoll < 0)
        die("epoll_create1");
    prepare_requests(&load);
    prepare_connections(&load);
    run(&load);
    print_result(&load);
    return load.errors > 0 || load.answered == 0;
}
