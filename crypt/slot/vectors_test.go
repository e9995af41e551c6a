package slot

import (
	"bytes"
	"compress/zlib"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"io/fs"
	"strings"
	"testing"

	agetest "c2sp.org/CCTV/age"
	"filippo.io/age"
)

// vector is one file of the public age test vectors (c2sp.org/CCTV/age): a few
// "key: value" lines, an empty line, the age file.
type vector struct {
	expect  string
	payload string // SHA-256, hex
	armored bool
	keys    Keys
	file    []byte
}

func parseVector(t *testing.T, b []byte) *vector {
	t.Helper()
	v := &vector{keys: Keys{MaxLogN: 12}}
	zipped := false
	for {
		line, rest, ok := bytes.Cut(b, []byte("\n"))
		if !ok {
			t.Fatal("no empty line")
		}
		b = rest
		if len(line) == 0 {
			break
		}
		key, value, _ := strings.Cut(string(line), ": ")
		switch key {
		case "expect":
			v.expect = value
		case "payload":
			v.payload = value
		case "passphrase":
			v.keys.Passphrase = sec(t, value)
		case "armored":
			v.armored = true
		case "compressed":
			zipped = true
		case "identity":
			ids, err := ParseIdentities(strings.NewReader(value), nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			v.keys.Identities = append(v.keys.Identities, ids...)
		}
	}
	if zipped {
		r, err := zlib.NewReader(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		if b, err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	v.file = b
	return v
}

// No vector is accepted unless it says success and holds 32 bytes; those that say
// success and do not are refused for their size alone; and what age's own stack
// decrypts, cut down to our bounds, is what we decrypt.
func TestVectors(t *testing.T) {
	list, err := fs.ReadDir(agetest.Vectors, ".")
	if err != nil || len(list) < 100 {
		t.Fatal(len(list), err)
	}
	opened, inspected := 0, 0
	for _, entry := range list {
		t.Run(entry.Name(), func(t *testing.T) {
			b, err := fs.ReadFile(agetest.Vectors, entry.Name())
			if err != nil {
				t.Fatal(err)
			}
			v := parseVector(t, b)
			var size int64 = -1
			if v.expect == "success" && !v.armored {
				size = plaintextSize(t, v)
			}
			if _, err := Inspect(v.file); err == nil {
				inspected++
			} else if size >= 0 && len(v.file) <= MaxFileSize {
				t.Errorf("a good header is refused: %v", err)
			}
			m, err := OpenFile(v.file, v.keys)
			if (err == nil) != (size == KeySize) {
				t.Fatalf("expect %q, %d bytes: %v", v.expect, size, err)
			}
			if err != nil {
				t.Log(err)
				if size >= 0 && len(v.file) <= MaxFileSize && !strings.Contains(err.Error(), "content of") {
					t.Error("refused for more than its size")
				}
				return
			}
			opened++
			if h := sha256.Sum256(m.Bytes()); hex.EncodeToString(h[:]) != v.payload {
				t.Error("another payload")
			}
		})
	}
	t.Logf("%d vectors, %d headers read, %d opened", len(list), inspected, opened)
}

// plaintextSize asks age.
func plaintextSize(t *testing.T, v *vector) int64 {
	t.Helper()
	ids := v.keys.Identities
	if v.keys.Passphrase.Len() != 0 {
		id, err := age.NewScryptIdentity(string(v.keys.Passphrase.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	r, err := age.Decrypt(bytes.NewReader(v.file), ids...)
	if err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, r)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
