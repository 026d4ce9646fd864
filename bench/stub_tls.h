/* TLS for the stub, over OpenSSL 3. Reads and writes answer as the stub's own: bytes, 0 = gone, -1 = not now. */
#include <stddef.h>
#include <sys/types.h>

void tls_begin(const char *certificate_path); /* makes a key and a certificate for 127.0.0.1, writes the latter as PEM */
void *tls_accept(int fd);                     /* the handshake happens inside the first reads; NULL before tls_begin */
ssize_t tls_read(void *tls, void *to, size_t n);
ssize_t tls_write(void *tls, const void *from, size_t n);
void tls_free(void *tls);
