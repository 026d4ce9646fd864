/* The bench's upstream: an OpenAI-style chat completion endpoint that streams paced SSE chunks.
 *
 * One thread, one epoll set, one timer wheel. A chunk costs it one clock reading, one copy of some 300 bytes and one
 * send(), which is nine tenths of it: on the machine it was written on, 8 us at 100,000 chunks a second (0.8 of a core)
 * and 12 us at 50,000. `python -m bench.drain` measures that.
 *
 * A request chooses its stream by the model's name, "stub:rate=50,chunks=500":
 *   rate     chunks per second; 0 = as fast as the reader takes them (the socket's own back-pressure, nothing dropped)
 *   chunks   how many content chunks, before finish_reason, usage and [DONE]
 *   content  characters of content in each; a multiple of 4, 4 unless told
 *   phase    1 = the first chunk waits a random part of a period, so that streams do not march in step; 0 = at once
 *   hold     1 = sends the headers and the role, then waits for GET /go
 *   linger   1 = stays open after the last chunk until GET /finish
 *   whole    1 = no stream: the whole answer as one chat.completion, at once
 * The content is the moment the chunk was made: CLOCK_MONOTONIC in units of 10 us, modulo 62^4 (147.7 s), as four
 * base-62 digits, repeated to fill the content. It is the clock of Python's time.monotonic_ns(), so any process of
 * this machine that sees the text can tell how old it is, however many chunks were merged on the way.
 *
 * GET /go     starts every held stream          GET /finish  ends every running stream properly, from its next write on
 * GET /stats  JSON: see answer_stats()
 *
 * Usage: stub [CERT.pem]   binds 127.0.0.1 on a free port, prints "ready PORT", ends with its parent.
 * With CERT.pem (a build with -DTLS only) it speaks TLS and first writes its own fresh certificate there.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#ifdef TLS
#include "stub_tls.h"
#endif

enum {
    MAX_FDS = 20000,
    REQUEST_MAX = 16384,   /* a request's headers and body */
    BLOCK = 65536,         /* what one turn of an unpaced stream writes at most */
    EVENT_MAX = 16384,     /* one SSE event with its HTTP chunk frame */
    TAIL_MAX = 2048,
    STAMP = 4,             /* characters of one time stamp */
    STAMP_UNIT_US = 10,
    SLOT_US = 100,         /* resolution of the timer wheel: finer than the 1 ms of epoll's own timeout */
    SLOTS = 16384,         /* a power of two; one turn of the wheel is 1.6 s, later dues stay for another turn */
};

typedef struct link { struct link *prev, *next; } link_t;

typedef enum { IDLE, HELD, RUNNING, LINGERING, ENDING } state_t;

typedef struct conn {
    link_t timer;               /* first member: a link of the wheel is its connection */
    int fd, want_write;
    state_t state;
    long rate, chunks, content, phase, hold, linger, whole;
    long sent;                  /* content chunks of this stream */
    uint64_t due_us, asked_us;  /* of the next chunk; when the request was complete */
    size_t in_len, out_len, out_off, out_cap;
    size_t event_len, stamp_at; /* the prepared event, and where in it the content begins */
    char *out, *event;
    char in[REQUEST_MAX];
#ifdef TLS
    void *tls;
#endif
} conn_t;

static conn_t *conns[MAX_FDS];
static link_t wheel[SLOTS];
static uint64_t tick;      /* the last slot that was run */
static long timed;         /* connections in the wheel */
static int epoll_fd, timer_fd;
static struct {
    long connections, held, running, requests, finished, aborted, sent, blocked;
    uint64_t late_max_us, first_us;
} stats;

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

/* ---- the timer wheel: a ring of lists, one per SLOT_US ---- */

static void link_out(link_t *l) {
    l->prev->next = l->next;
    l->next->prev = l->prev;
    l->prev = l->next = l;
}

static void link_in(link_t *head, link_t *l) {
    l->prev = head->prev;
    l->next = head;
    head->prev->next = l;
    head->prev = l;
}

static int is_timed(const conn_t *c) { return c->timer.next != &c->timer; }

static void untime(conn_t *c) {
    if (!is_timed(c)) return;
    link_out(&c->timer);
    timed--;
}

static void time_at(conn_t *c, uint64_t due_us) {
    untime(c);
    c->due_us = due_us;
    uint64_t slot = due_us / SLOT_US + 1;  /* rounded up: never early */
    if (slot <= tick) slot = tick + 1;
    link_in(&wheel[slot % SLOTS], &c->timer);
    timed++;
}

/* Arms the timer for the next slot that holds something, or for nothing. */
static void arm(void) {
    struct itimerspec when = {0};
    if (timed) {
        uint64_t slot = tick + 1;
        while (wheel[slot % SLOTS].next == &wheel[slot % SLOTS]) slot++;
        uint64_t us = slot * SLOT_US;
        when.it_value.tv_sec = (time_t)(us / 1000000u);
        when.it_value.tv_nsec = (long)(us % 1000000u) * 1000;
    }
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

/* ---- sockets ---- */

/* Bytes moved, 0 = the peer is gone, -1 = not now. */
static ssize_t io_read(conn_t *c, void *to, size_t n) {
#ifdef TLS
    if (c->tls) return tls_read(c->tls, to, n);
#endif
    ssize_t got = recv(c->fd, to, n, 0);
    return got >= 0 ? got : (errno == EAGAIN || errno == EINTR) ? -1 : 0;
}

static ssize_t io_write(conn_t *c, const void *from, size_t n) {
#ifdef TLS
    if (c->tls) return tls_write(c->tls, from, n);
#endif
    ssize_t put = send(c->fd, from, n, MSG_NOSIGNAL);
    return put > 0 ? put : (errno == EAGAIN || errno == EINTR) ? -1 : 0;
}

static void want_write(conn_t *c, int on) {
    if (c->want_write == on) return;
    struct epoll_event e = {.events = EPOLLIN | (on ? EPOLLOUT : 0u), .data.fd = c->fd};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &e);
    c->want_write = on;
}

static void leave_state(conn_t *c) {
    if (c->state == HELD) stats.held--;
    if (c->state == RUNNING || c->state == LINGERING) stats.running--;
}

static void enter(conn_t *c, state_t state) {
    leave_state(c);
    c->state = state;
    if (state == HELD) stats.held++;
    if (state == RUNNING || state == LINGERING) stats.running++;
}

static void drop(conn_t *c) {
    if (c->state != IDLE) stats.aborted++;
    leave_state(c);
    untime(c);
#ifdef TLS
    if (c->tls) tls_free(c->tls);
#endif
    conns[c->fd] = NULL;
    close(c->fd);
    free(c->out);
    free(c->event);
    free(c);
    stats.connections--;
}

static void append(conn_t *c, const char *bytes, size_t n) {
    if (c->out_len + n > c->out_cap) {
        c->out_cap = c->out_len + n > 4096 ? BLOCK + EVENT_MAX + TAIL_MAX : 4096;
        c->out = realloc(c->out, c->out_cap);
        if (!c->out || c->out_len + n > c->out_cap) die("out of memory");
    }
    memcpy(c->out + c->out_len, bytes, n);
    c->out_len += n;
}

/* Sends what is waiting. 1 = all gone, 0 = the reader must take some first, -1 = the connection is gone and freed. */
static int flush_out(conn_t *c) {
    while (c->out_off < c->out_len) {
        ssize_t put = io_write(c, c->out + c->out_off, c->out_len - c->out_off);
        if (put == 0) {
            drop(c);
            return -1;
        }
        if (put < 0) {
            stats.blocked++;
            want_write(c, 1);
            return 0;
        }
        c->out_off += (size_t)put;
    }
    c->out_off = c->out_len = 0;
    return 1;
}

/* ---- one stream ---- */

static void append_framed(conn_t *c, const char *event, size_t n) {
    char frame[24];
    append(c, frame, (size_t)snprintf(frame, sizeof frame, "%zx\r\n", n));
    append(c, event, n);
    append(c, "\r\n", 2);
}

/* An event of this stream: `choices` is the inside of the array, `more` further fields. Returns its length. */
static size_t event_text(const conn_t *c, char *to, size_t cap, const char *choices, const char *more) {
    return (size_t)snprintf(to, cap,
        "data: {\"id\":\"chatcmpl-stub%08d%012llu\",\"object\":\"chat.completion.chunk\",\"created\":1732264000,"
        "\"model\":\"stub-2026-11\",\"service_tier\":\"default\",\"system_fingerprint\":\"fp_stub\",\"choices\":[%s]%s}\n\n",
        c->fd, (unsigned long long)c->asked_us % 1000000000000ull, choices, more);
}

/* Prepares the content event once, so that a chunk is a copy with a new stamp: 250 to 350 bytes with 4 of content. */
static void prepare_event(conn_t *c) {
    static char choices[EVENT_MAX], text[EVENT_MAX], more[128];
    static const char filler[] = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ";
    size_t head = (size_t)sprintf(choices, "{\"index\":0,\"delta\":{\"content\":\"");
    memset(choices + head, '0', (size_t)c->content);
    strcpy(choices + head + c->content, "\"},\"logprobs\":null,\"finish_reason\":null}");
    snprintf(more, sizeof more, ",\"obfuscation\":\"%.*s\"", (int)(random() % 60), filler);
    size_t n = event_text(c, text, sizeof text, choices, more);
    free(c->event);
    c->event = malloc(n + 32);
    if (!c->event) die("out of memory");
    size_t frame = (size_t)sprintf(c->event, "%zx\r\n", n);
    memcpy(c->event + frame, text, n);
    memcpy(c->event + frame + n, "\r\n", 2);
    c->event_len = frame + n + 2;
    c->stamp_at = frame + (size_t)(strstr(text, "\"content\":\"") - text) + strlen("\"content\":\"");
}

static void append_chunk(conn_t *c, uint64_t now) {
    static const char digits[] = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    char stamp[STAMP];
    uint64_t value = now / STAMP_UNIT_US;
    for (int i = STAMP - 1; i >= 0; i--, value /= 62) stamp[i] = digits[value % 62];
    for (long at = 0; at < c->content; at += STAMP) memcpy(c->event + c->stamp_at + at, stamp, STAMP);
    append(c, c->event, c->event_len);
    if (c->sent++ == 0) stats.first_us += now - c->asked_us;
    stats.sent++;
}

static void append_tail(conn_t *c) {
    char text[TAIL_MAX], usage[160];
    size_t n = event_text(c, text, sizeof text,
                          "{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}", "");
    append_framed(c, text, n);
    snprintf(usage, sizeof usage, ",\"usage\":{\"prompt_tokens\":8,\"completion_tokens\":%ld,\"total_tokens\":%ld}",
             c->sent, c->sent + 8);
    append_framed(c, text, event_text(c, text, sizeof text, "", usage));
    append_framed(c, "data: [DONE]\n\n", 14);
    append(c, "0\r\n\r\n", 5);
    enter(c, ENDING);
    untime(c);
}

static void read_requests(conn_t *c);

/* Carries a stream on after its waiting bytes have gone: the answer's end, the next block, or the next due time. */
static void carry_on(conn_t *c) {
    for (int turn = 0; turn < 4; turn++) {
        int gone = flush_out(c);
        if (gone <= 0) return;
        if (c->state == ENDING) {
            enter(c, IDLE);
            stats.finished++;
            want_write(c, 0);
            read_requests(c);  /* keep-alive: the next request may be here already */
            return;
        }
        if (c->state != RUNNING) {
            want_write(c, 0);
            return;
        }
        if (c->rate > 0) {
            want_write(c, 0);
            /* After a blocked write the pace begins anew: a paced stream makes no burst of what the reader missed. */
            if (!is_timed(c)) time_at(c, now_us());
            return;
        }
        uint64_t now = now_us();
        while (c->sent < c->chunks && c->out_len < BLOCK) append_chunk(c, now);
        if (c->sent >= c->chunks) {
            if (c->linger) enter(c, LINGERING);
            else append_tail(c);
        }
    }
    want_write(c, 1);  /* an unpaced stream gives the others a turn, and is called back at once */
}

/* A paced stream's next chunk is due. */
static void on_due(conn_t *c, uint64_t now) {
    if (c->out_off < c->out_len) return;  /* blocked: carry_on() sets the next time */
    uint64_t late = now - c->due_us;
    if (late > stats.late_max_us) stats.late_max_us = late;
    append_chunk(c, now);
    if (c->sent >= c->chunks) {
        if (c->linger) enter(c, LINGERING);
        else append_tail(c);
    } else {
        time_at(c, c->due_us + (uint64_t)(1000000 / c->rate));
    }
    carry_on(c);
}

static void start(conn_t *c, uint64_t now) {
    enter(c, RUNNING);
    if (c->chunks == 0) {
        append_tail(c);
        carry_on(c);
    } else if (c->rate == 0) {
        carry_on(c);
    } else if (c->phase) {
        time_at(c, now + (uint64_t)random() % (uint64_t)(1000000 / c->rate));
    } else {
        c->due_us = now;
        on_due(c, now);
    }
}

/* ---- requests ---- */

static void answer(conn_t *c, const char *status, const char *json) {
    char text[1024];
    append(c, text, (size_t)snprintf(text, sizeof text,
        "HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s", status, strlen(json), json));
}

static void answer_stats(conn_t *c) {
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    char json[700];
    snprintf(json, sizeof json,
        "{\"connections\":%ld,\"held\":%ld,\"running\":%ld,\"requests\":%ld,\"finished\":%ld,\"aborted\":%ld,"
        "\"sent\":%ld,\"blocked\":%ld,"                       /* content chunks; writes the reader made wait */
        "\"late_max_us\":%llu,"                               /* worst delay behind schedule since the last /stats */
        "\"first_us\":%llu,"                                  /* sum over streams: request complete to first chunk */
        "\"cpu_us\":%llu}",
        stats.connections, stats.held, stats.running, stats.requests, stats.finished, stats.aborted, stats.sent,
        stats.blocked, (unsigned long long)stats.late_max_us, (unsigned long long)stats.first_us,
        (unsigned long long)(use.ru_utime.tv_sec + use.ru_stime.tv_sec) * 1000000u
            + (unsigned long long)(use.ru_utime.tv_usec + use.ru_stime.tv_usec));
    stats.late_max_us = 0;
    answer(c, "200 OK", json);
}

static void answer_whole(conn_t *c) {
    static char json[EVENT_MAX];
    char head[128];
    int length = (int)(c->chunks * c->content);
    int n = snprintf(json, sizeof json,
        "{\"id\":\"chatcmpl-stub%08d%012llu\",\"object\":\"chat.completion\",\"created\":1732264000,"
        "\"model\":\"stub-2026-11\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"%0*d\","
        "\"refusal\":null},\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":8,"
        "\"completion_tokens\":%ld,\"total_tokens\":%ld}}",
        c->fd, (unsigned long long)now_us() % 1000000000000ull, length, 0, c->chunks, c->chunks + 8);
    append(c, head, (size_t)snprintf(head, sizeof head,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n", n));
    append(c, json, (size_t)n);
    stats.requests++;
    stats.finished++;
}

static long number(const char *fields, const char *end, const char *name, long otherwise) {
    const char *at = memmem(fields, (size_t)(end - fields), name, strlen(name));
    return at ? strtol(at + strlen(name), NULL, 10) : otherwise;
}

/* Reads the stream's shape out of the model's name. 0 = this is no request for a stream, or a shape out of bounds. */
static int read_shape(conn_t *c, const char *body, size_t n) {
    const char *from = memmem(body, n, "\"stub:", 6);
    if (!from) return 0;
    from += 6;
    const char *to = memchr(from, '"', n - (size_t)(from - body));
    if (!to) return 0;
    c->rate = number(from, to, "rate=", 50);
    c->chunks = number(from, to, "chunks=", 100);
    c->content = number(from, to, "content=", STAMP);
    c->phase = number(from, to, "phase=", 1);
    c->hold = number(from, to, "hold=", 0);
    c->linger = number(from, to, "linger=", 0);
    c->whole = number(from, to, "whole=", 0);
    if (c->whole && c->chunks * c->content > EVENT_MAX - 1024) return 0;
    return c->rate >= 0 && c->rate <= 1000000 && c->chunks >= 0 && c->content >= STAMP && c->content % STAMP == 0
        && c->content <= EVENT_MAX - 1024;
}

static void begin_stream(conn_t *c) {
    int fd = c->fd;
    static const char head[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                               "Transfer-Encoding: chunked\r\nCache-Control: no-cache\r\n\r\n";
    char text[TAIL_MAX];
    c->sent = 0;
    c->asked_us = now_us();
    stats.requests++;
    prepare_event(c);
    append(c, head, sizeof head - 1);
    size_t n = event_text(c, text, sizeof text,
        "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}", "");
    append_framed(c, text, n);
    if (c->hold) {
        enter(c, HELD);
        carry_on(c);
        return;
    }
    start(c, c->asked_us);
    if (conns[fd] != c) return;  /* the reader left, and c with it */
    if (c->out_off < c->out_len && !c->want_write) carry_on(c);  /* the head, ahead of its phase */
}

static void start_held(void) {
    uint64_t now = now_us();
    for (int fd = 0; fd < MAX_FDS; fd++)
        if (conns[fd] && conns[fd]->state == HELD) start(conns[fd], now);
}

static void finish_all(void) {
    for (int fd = 0; fd < MAX_FDS; fd++) {
        conn_t *c = conns[fd];
        if (!c || (c->state != RUNNING && c->state != LINGERING && c->state != HELD)) continue;
        append_tail(c);
        carry_on(c);
    }
}

/* Answers every request that is complete in c->in. May free c. */
static void read_requests(conn_t *c) {
    while (c->state == IDLE) {
        char *end = memmem(c->in, c->in_len, "\r\n\r\n", 4);
        if (!end) break;
        size_t head = (size_t)(end - c->in) + 4, body = 0;
        for (char *line = c->in; line < end; line++)
            if (line[0] == '\n' && !strncasecmp(line + 1, "content-length:", 15)) body = strtoul(line + 16, NULL, 10);
        if (head + body > REQUEST_MAX) {
            drop(c);  /* no request of the bench is that large */
            return;
        }
        if (c->in_len < head + body) return;
        int stream = 0, go = 0, finish = 0;
        if (!strncmp(c->in, "POST ", 5) && read_shape(c, c->in + head, body)) stream = 1;
        else if (!strncmp(c->in, "GET /stats ", 11)) answer_stats(c);
        else if (!strncmp(c->in, "GET /go ", 8)) go = 1;
        else if (!strncmp(c->in, "GET /finish ", 12)) finish = 1;
        else answer(c, "404 Not Found", "{\"error\":{\"message\":\"not a request of this stub\",\"code\":\"not_found\"}}");
        c->in_len -= head + body;
        memmove(c->in, c->in + head + body, c->in_len);
        if (stream && c->whole) {
            answer_whole(c);
        } else if (stream) {
            begin_stream(c);
            return;
        }
        if (go) start_held();
        if (finish) finish_all();
        if (go || finish) answer(c, "200 OK", "{}");
        if (flush_out(c) < 0) return;
    }
    if (c->in_len == REQUEST_MAX) drop(c);
}

static void on_readable(conn_t *c) {
    for (;;) {
        ssize_t got = io_read(c, c->in + c->in_len, REQUEST_MAX - c->in_len);
        if (got == 0) {
            drop(c);
            return;
        }
        if (got < 0) break;
        c->in_len += (size_t)got;
        if (c->in_len == REQUEST_MAX) break;
    }
    read_requests(c);
}

static void on_connections(int listener) {
    int fd, yes = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        conn_t *c = fd < MAX_FDS ? calloc(1, sizeof *c) : NULL;
        if (!c) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        c->fd = fd;
        c->timer.prev = c->timer.next = &c->timer;
        conns[fd] = c;
        stats.connections++;
#ifdef TLS
        c->tls = tls_accept(fd);
#endif
        struct epoll_event e = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &e);
    }
}

/* Runs every slot up to now. The slot's list is moved aside first: what it schedules again belongs to a later one. */
static void run_wheel(void) {
    uint64_t now = now_us(), until = now / SLOT_US;
    for (; tick < until; ) {
        link_t *slot = &wheel[++tick % SLOTS], due = {&due, &due};
        if (slot->next == slot) continue;
        due = *slot;
        due.next->prev = due.prev->next = &due;
        slot->prev = slot->next = slot;
        while (due.next != &due) {
            conn_t *c = (conn_t *)due.next;
            untime(c);
            now = now_us();
            if (c->due_us > now) time_at(c, c->due_us);  /* for a later turn of the wheel */
            else on_due(c, now);
        }
    }
}

static int listen_on_loopback(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, n) || listen(fd, 4096)) die("listen");
    if (getsockname(fd, (struct sockaddr *)&address, &n)) die("getsockname");
    printf("ready %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    signal(SIGPIPE, SIG_IGN);  /* OpenSSL writes without MSG_NOSIGNAL */
#ifdef TLS
    if (argc == 2) tls_begin(argv[1]);
#else
    if (argc != 1) {
        fprintf(stderr, "%s: this build has no TLS\n", argv[0]);
        return 2;
    }
#endif
    for (int i = 0; i < SLOTS; i++) wheel[i].prev = wheel[i].next = &wheel[i];
    tick = now_us() / SLOT_US;
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    int listener = listen_on_loopback();
    struct epoll_event e = {.events = EPOLLIN, .data.fd = listener}, ready[256];
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &e);
    e = (struct epoll_event){.events = EPOLLIN | EPOLLET, .data.fd = timer_fd};  /* edges: it need not be read */
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, timer_fd, &e);
    for (;;) {
        arm();
        int n = epoll_wait(epoll_fd, ready, 256, -1);
        for (int i = 0; i < n; i++) {
            int fd = ready[i].data.fd;
            if (fd == listener) on_connections(listener);
            if (fd == listener || fd == timer_fd || !conns[fd]) continue;
            if (ready[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) on_readable(conns[fd]);
            if (conns[fd] && ready[i].events & EPOLLOUT) carry_on(conns[fd]);
        }
        run_wheel();
    }
}
