/* See stub_tls.h. The key never leaves this process; the certificate is written for the client to trust. */
#include "stub_tls.h"

#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>

static SSL_CTX *context;

static void check(int ok) {
    if (ok) return;
    ERR_print_errors_fp(stderr);
    exit(1);
}

static void extend(X509 *certificate, int kind, const char *value) {
    X509V3_CTX v3;
    X509V3_set_ctx(&v3, certificate, certificate, NULL, NULL, 0);
    X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, &v3, kind, value);
    check(extension && X509_add_ext(certificate, extension, -1));
    X509_EXTENSION_free(extension);
}

void tls_begin(const char *certificate_path) {
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *certificate = X509_new();
    check(key && certificate && X509_set_version(certificate, 2));
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -3600);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 7 * 86400);
    X509_NAME *name = X509_get_subject_name(certificate);
    check(X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)"bench stub", -1, -1, 0));
    check(X509_set_issuer_name(certificate, name) && X509_set_pubkey(certificate, key));
    extend(certificate, NID_basic_constraints, "critical,CA:TRUE");
    extend(certificate, NID_subject_alt_name, "IP:127.0.0.1,DNS:localhost");
    extend(certificate, NID_subject_key_identifier, "hash");
    check(X509_sign(certificate, key, EVP_sha256()) > 0);
    FILE *file = fopen(certificate_path, "w");
    check(file && PEM_write_X509(file, certificate) && !fclose(file));
    context = SSL_CTX_new(TLS_server_method());
    check(context && SSL_CTX_use_certificate(context, certificate) == 1 && SSL_CTX_use_PrivateKey(context, key) == 1);
    SSL_CTX_set_mode(context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_num_tickets(context, 0);
}

void *tls_accept(int fd) {
    if (!context) return NULL;
    SSL *tls = SSL_new(context);
    check(tls && SSL_set_fd(tls, fd));
    SSL_set_accept_state(tls);
    return tls;
}

static ssize_t outcome(SSL *tls, int result) {
    if (result > 0) return result;
    int why = SSL_get_error(tls, result);
    ERR_clear_error();
    return why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE ? -1 : 0;
}

ssize_t tls_read(void *tls, void *to, size_t n) { return outcome(tls, SSL_read(tls, to, (int)n)); }

ssize_t tls_write(void *tls, const void *from, size_t n) { return outcome(tls, SSL_write(tls, from, (int)n)); }

void tls_free(void *tls) { SSL_free(tls); }
