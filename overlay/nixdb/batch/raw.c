// The bytes of a database file as they lie on the disk, by SQLite's own descriptor: to
// open the file once more and to close that would drop the locks of the process.
#include "batch.h"

int sqlite3_file_control(sqlite3 *, const char *, int, void *);

// From sqlite.org/c3ref/io_methods.html and file.html: the first members of tables
// that SQLite only ever extends at the end.
typedef struct raw_file raw_file;
typedef struct {
	int version;
	int (*close)(raw_file *);
	int (*read)(raw_file *, void *, int amount, long long offset);
	int (*write)(raw_file *, const void *, int amount, long long offset);
	int (*truncate)(raw_file *, long long size);
	int (*sync)(raw_file *, int flags);
	int (*size)(raw_file *, long long *size);
} raw_methods;
struct raw_file {
	const raw_methods *methods;
};

enum {
	SQLITE_OK = 0,
	SQLITE_CANTOPEN = 14,
	SQLITE_FCNTL_FILE_POINTER = 7,
	SQLITE_IOERR_SHORT_READ = 10 | 2 << 8,
};

static int file(sqlite3 *db, raw_file **f) {
	*f = 0;
	int rc = sqlite3_file_control(db, "main", SQLITE_FCNTL_FILE_POINTER, f);
	if (rc == SQLITE_OK && (*f == 0 || (*f)->methods == 0))
		rc = SQLITE_CANTOPEN;
	return rc;
}

int ok_raw_size(sqlite3 *db, int64_t *size) {
	raw_file *f;
	long long n = 0;
	int rc = file(db, &f);
	if (rc == SQLITE_OK)
		rc = f->methods->size(f, &n);
	*size = n;
	return rc;
}

// ok_raw_read fills what lies beyond the end of the file with zeros, as SQLite does.
int ok_raw_read(sqlite3 *db, void *to, int amount, int64_t offset) {
	raw_file *f;
	int rc = file(db, &f);
	if (rc == SQLITE_OK)
		rc = f->methods->read(f, to, amount, offset);
	return rc == SQLITE_IOERR_SHORT_READ ? SQLITE_OK : rc;
}
