package policies

// worlds are small stores, one for each person: what of a real one their policy is
// about (storegen.World says how to read them).
var worlds = map[string]string{
	"laptop-nda": `
root /run/current-system nixos-system-26.05
root /run/booted-system  nixos-system-25.11
glibc-2.42          out signed cache.nixos.org-1
linux-6.18          out signed cache.nixos.org-1
hello-2.12          out signed cache.nixos.org-1 -> glibc-2.42
etc-nixos           out here -> glibc-2.42
nixos-system-26.05  out here by nixos-system-26.05.drv -> linux-6.18 etc-nixos
nixos-system-26.05.drv drv => nixos-system-26.05
nixos-system-25.11  out here -> linux-6.18 etc-nixos
notes-0.1           out here -> glibc-2.42
# A flake of the client's: its name tells nothing.
source              src from git+ssh://git@code.bluefin.example/fw?rev=1
source-nixpkgs      src from github:NixOS/nixpkgs/1
bluefin-hal-1.2     out here by bluefin-hal-1.2.drv -> glibc-2.42
bluefin-hal-1.2.drv drv -> source => bluefin-hal-1.2
fw-image-7          out here by fw-image-7.drv
fw-image-7.drv      drv -> bluefin-hal-1.2.drv => fw-image-7
`,
	"consultant": `
root /nix/var/nix/profiles/default user-environment
glibc-2.42          out signed cache.nixos.org-1
gcc-15              out signed cache.nixos.org-1 -> glibc-2.42
nix-2.34            out -> glibc-2.42
user-environment    out -> nix-2.34
nib-lint-1          out here by nib-lint-1.drv -> glibc-2.42
nib-lint-1.drv      drv -> nib-source => nib-lint-1
nib-source          src from github:consultant/nib/1
draft-1             out here -> glibc-2.42
acme-rules-3        out here by acme-rules-3.drv
acme-rules-3.drv    drv -> source => acme-rules-3
source              src from git+ssh://git@acme.example/rules
nib-report-1        out here by nib-report-1.drv -> glibc-2.42
nib-report-1.drv    drv -> nib-source acme-rules-3.drv => nib-report-1
quote-acme-2        out here
ledger-9            out signed cache.globex.example-1 -> glibc-2.42
curl-8.17           out signed cache.globex.example-1 cache.nixos.org-1 -> glibc-2.42
initech-env-4       out here -> armcc-6 gcc-15
armcc-6             out here -> glibc-2.42
armcc-manual-6      out here licence initech-internal
`,
	"family": `
root /run/current-system nixos-system-26.05
root /nix/var/nix/profiles/family family-env
glibc-2.42          out signed cache.nixos.org-1
python3-3.13        out signed cache.nixos.org-1 -> glibc-2.42
firefox-150         out signed cache.nixos.org-1 -> glibc-2.42
glucose-log-1       out signed cache.nixos.org-1 -> python3-3.13
carb-counter-2      out signed cache.nixos.org-1 -> python3-3.13
nixos-system-26.05  out here -> glibc-2.42
photo-frame-1       out here -> python3-3.13
family-env          out here -> photo-frame-1 firefox-150
game-island-3       out here size 40000000000 -> glibc-2.42
game-copied-1       out size 40000000000 -> glibc-2.42
holiday-film-1      out here size 9000000000
game-sketch-0.1     out here size 900000 -> glibc-2.42
`,
	"researcher": `
glibc-2.42          out signed cache.nixos.org-1 by glibc-2.42.drv
glibc-2.42.drv      drv => glibc-2.42
R-4.5               out signed cache.nixos.org-1 by R-4.5.drv -> glibc-2.42
R-4.5.drv           drv -> glibc-2.42.drv => R-4.5
r-lme4-1.1          out here by r-lme4-1.1.drv -> R-4.5
r-lme4-1.1.drv      drv -> lme4.tar.gz.drv R-4.5.drv setup.sh => r-lme4-1.1
setup.sh            src
lme4.tar.gz.drv     drv => lme4.tar.gz
lme4.tar.gz         fixed here by lme4.tar.gz.drv size 90000000 from https://cran.example/lme4.tar.gz
# Its .drv was collected.
python3.13-scipy-1  out here by python3.13-scipy-1.drv -> glibc-2.42
python3.13-scipy-1.drv drv -> glibc-2.42.drv setup.sh => python3.13-scipy-1
jq-1.8              out signed cache.nixos.org-1 -> glibc-2.42
r-copied-1          out by r-copied-1.drv -> R-4.5
exomes.vcf.gz       src
cells.h5ad          src
r-survival-3        out here by r-survival-3.drv -> R-4.5
r-norms-1           out here by r-norms-1.drv -> R-4.5
r-norms-1.drv       drv -> cohort-2026 R-4.5.drv => r-norms-1
cohort-2026         src size 9000000
genotypes.csv       fixed here by genotypes.csv.drv from https://data.lab.example/genotypes.csv
genotypes.csv.drv   drv => genotypes.csv
figures-1           out here by figures-1.drv
figures-1.drv       drv -> cohort-2026 r-lme4-1.1.drv => figures-1
scans               src size 9000000000
thesis              src size 90000
`,
	"company": `
root /run/current-system nixos-system-26.05
glibc-2.42          out signed cache.nixos.org-1
corp-vpn-4          out signed cache.corp.example-1 -> glibc-2.42
nixos-system-26.05  out signed cache.corp.example-1 -> corp-vpn-4
nginx-1.29          out signed cache.corp.example-1 -> glibc-2.42
nginx-1.29.tar.gz   fixed signed cache.corp.example-1 by nginx-1.29.tar.gz.drv
corp-billing-12     out signed cache.corp.example-1 -> glibc-2.42
corp-charts-2       out signed cache.corp.example-1
report-viewer-3     out signed cache.corp.example-1 -> corp-charts-2
experiment-1        out here -> glibc-2.42
payments-api-5      out signed cache.corp.example-1 -> glibc-2.42
hsm-sdk-2           out signed cache.corp.example-1 licence per-seat-hsm
fraud-model.bin     fixed signed cache.corp.example-1 by fraud-model.bin.drv from https://artifacts.corp.example/fraud-model.bin
fraud-model.bin.drv drv => fraud-model.bin
`,
	"ci": `
root /nix/var/nix/gcroots/release parser-1.0
stdenv              out signed cache.nixos.org-1 by stdenv.drv
stdenv.drv          drv => stdenv
parser-src          src from github:parser/parser/1
parser-1.0.drv      drv -> parser-src stdenv.drv => parser-1.0
parser-1.0          out here by parser-1.0.drv -> stdenv
deploy-config       src
release-signing-key src
installer-with-key.drv drv -> parser-1.0.drv deploy-config => installer-with-key
installer-with-key  out here by installer-with-key.drv -> parser-1.0
somebodys-tool      out by somebodys-tool.drv
somebodys-tool.drv  drv => somebodys-tool
orphan              out here by orphan.drv
`,
	"student": `
root /nix/var/nix/profiles/default user-environment
glibc-2.42          out signed cache.nixos.org-1
hello-2.12          out signed cache.nixos.org-1 -> glibc-2.42
glibc-2.40          out
nix-2.34            out -> glibc-2.40
user-environment    out -> nix-2.34
thesis-1            out here -> glibc-2.42
matlab-2026         out here unfree -> glibc-2.42
homework-3          out here -> glibc-2.42
`,
	"gamer": `
root /run/current-system nixos-system-26.05
glibc-2.42          out signed cache.nixos.org-1 by glibc-2.42.drv
glibc-2.42.drv      drv => glibc-2.42
mesa-26             out signed cache.nixos.org-1 by mesa-26.drv -> glibc-2.42
mesa-26.drv         drv -> glibc-2.42.drv => mesa-26
# Built by the installer's system, whose .drv files nobody kept.
nvidia-x11-600      out here unfree by nvidia-x11-600.drv -> glibc-2.42
nixos-system-26.05  out here -> nvidia-x11-600
steam.deb           fixed here by steam.deb.drv from https://repo.steampowered.example/steam.deb
steam.deb.drv       drv => steam.deb
cuda.run            fixed here by cuda.run.drv from https://download.nvidia.example/cuda.run
cuda.run.drv        drv => cuda.run
patch.bin           fixed here by patch.bin.drv from https://warez.example/patch.bin
patch.bin.drv       drv => patch.bin
steam-1.0           out here unfree by steam-1.0.drv -> mesa-26
steam-1.0.drv       drv -> steam.deb.drv setup.sh => steam-1.0
setup.sh            src
setup_quest.sh      src unfree
witch-gog-4.sh      src unfree
quest-2             out here unfree by quest-2.drv -> mesa-26
quest-2.drv         drv -> setup_quest.sh => quest-2
racer-1             out here unfree by racer-1.drv -> mesa-26
emulator-1          out here by emulator-1.drv -> mesa-26
emulator-1.drv      drv => emulator-1
mod-tool-1          out here free by mod-tool-1.drv -> mesa-26
mod-tool-1.drv      drv => mod-tool-1
cheat-1             out unfree by cheat-1.drv -> mesa-26
cheat-1.drv         drv => cheat-1
`,
	"journalist": `
root /run/current-system nixos-system-26.05
glibc-2.42          out signed cache.nixos.org-1
gtk-4               out signed cache.nixos.org-1 -> glibc-2.42
nixos-system-26.05  out here -> gtk-4
tor-browser-15      out signed cache.nixos.org-1 -> gtk-4
tor-browser-15.tar.xz fixed signed cache.nixos.org-1
onionshare-2        out signed cache.nixos.org-1 -> qtbase-6 python3-stem-1
onionshare-2.drv    drv => onionshare-2
python3-stem-1      out signed cache.nixos.org-1 -> glibc-2.42
qtbase-6            out signed cache.nixos.org-1 -> glibc-2.42
okular-26           out signed cache.nixos.org-1 -> qtbase-6
draft-1             out here -> glibc-2.42
`,
	"server": `
root /nix/var/nix/profiles/system nixos-system-26.05
root /nix/var/nix/profiles/shop   shop-env
glibc-2.42          out signed cache.nixos.org-1
postgresql-18       out signed cache.nixos.org-1 -> glibc-2.42
unit-shop.service   out
nixos-system-26.05  out -> unit-shop.service postgresql-18
shop-api-3          out -> glibc-2.42
shop-api-4          out -> glibc-2.42
settings.json       out
shop-env            out -> shop-api-3 settings.json postgresql-18
old-site            out -> glibc-2.42
`,
}
